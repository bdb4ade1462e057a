# Called as nixpkgs is, answers with the trimmed package set and the few names of ours that it lacks.
# Each call is an instance, which the tests count.
arguments:
builtins.trace "an instance of nixpkgs" import "@corepkgs@" (
  # It knows none of our unfree settings.
  removeAttrs arguments [ "config" ]
  // {
    overlays = [
      (final: _prev: {
        path = ./.;
        # As nixpkgs does, which keeps the name for a while.
        system = builtins.trace "a deprecated name of nixpkgs" final.stdenv.hostPlatform.system;
        ugrep = final.gnugrep;
        mkShell = attributes: final.runCommand "shell" { inherit (attributes) packages; } "";
        cudaPackages_12_9.cudaMajorMinorVersion = "12.9";
        llama-cpp = final.lib.makeOverridable (
          {
            cudaSupport ? false,
            cudaPackages ? { },
          }:
          final.stdenv.mkDerivation {
            pname = "llama-cpp";
            version = "0";
            inherit cudaSupport;
            cudaVersion = cudaPackages.cudaMajorMinorVersion or "";
            cmakeFlags = [ "-DCMAKE_CUDA_ARCHITECTURES=75;80;90" ];
          }
        ) { };
        nixfmt-tree = final.gnugrep;
        nixfmt = final.gnugrep;
        statix = final.gnugrep;
        deadnix = final.gnugrep;
        prometheus.cli = final.gnugrep;
        linuxPackages.nvidiaPackages =
          final.lib.mapAttrs (_: version: { inherit version; })
            (import "@repository@/tests/nix/stand-in.nix" { inherit (final) lib; }).driverVersions;
        nixosOptionsDoc = _: { optionsCommonMark = final.gnugrep; };
        # Evaluates every node, and fails where an assertion does.
        testers.runNixOSTest =
          test:
          let
            evalConfig = import ./nixos/lib/eval-config.nix;
            broken = final.lib.concatMapAttrs (
              name: module:
              let
                node = evalConfig { modules = [ module ]; };
                messages = map (a: a.message) (final.lib.filter (a: !a.assertion) node.config.assertions);
              in
              builtins.seq node.config.system.build.toplevel.drvPath (
                final.lib.optionalAttrs (messages != [ ]) { ${name} = messages; }
              )
            ) test.nodes;
          in
          assert broken == { } || throw (builtins.toJSON broken);
          final.writeText test.name test.testScript;
      })
    ]
    ++ (arguments.overlays or [ ]);
  }
)
