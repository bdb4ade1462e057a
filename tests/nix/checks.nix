# What `nix flake check` runs if nixpkgs is available: formatting, linters, option documentation, the case table against the
# real NixOS modules, and every host's toplevel. No check's name needs a system to be evaluated, only its text does: `nix flake show`
# lists them at once. The virtual machines (vm.nix) are an output of their own.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  source = lib.cleanSource ../..;
  run =
    name: tools: script:
    pkgs.runCommand name { nativeBuildInputs = tools; } ''
      cd ${source}
      ${script}
      touch $out
    '';
  cases = import ./cases.nix {
    inherit lib;
    versions = lib.mapAttrs (_: driver: driver.version or null) pkgs.linuxPackages.nvidiaPackages;
  };

  system =
    module:
    self.inputs.nixpkgs.lib.nixosSystem {
      system = "x86_64-linux";
      modules = [
        self.nixosModules.default
        module
        {
          # The minimum that makes a system complete, unless a case sets it.
          boot.loader.grub.device = lib.mkDefault "/dev/null";
          fileSystems."/" = lib.mkDefault {
            device = "/dev/disk/by-label/root";
            fsType = "ext4";
          };
          system.stateVersion = "26.05";
        }
      ];
    };
  failed =
    module: map (a: a.message) (lib.filter (a: !a.assertion) (system module).config.assertions);
  # An instance's settings name its engine, which need not be built for them to be checked.
  withoutEngine =
    let
      engine = pkgs.emptyDirectory;
    in
    {
      nixpkgs.overlays = [
        (_final: _prev: {
          pascaline-engine = engine;
          llama-cpp-pascal = engine;
        })
      ];
    };
  settingsOf =
    configuration:
    lib.mapAttrsToList (_: instance: "${instance.configFile}")
      (configuration.extendModules { modules = [ withoutEngine ]; }).config.services.pascaline.instances;
  # As writeText, which asks what its text is before it has a name.
  textFile =
    name: text:
    pkgs.runCommand name {
      inherit text;
      passAsFile = [ "text" ];
    } "cp $textPath $out";
  # Evaluating the whole system proves it; building it would need CUDA.
  evaluates =
    name: configuration:
    textFile "evaluates-${name}" (
      builtins.unsafeDiscardStringContext configuration.config.system.build.toplevel.drvPath
    );
in
{
  format = run "format" [ pkgs.nixfmt ] "nixfmt --check $(find . -name '*.nix')";
  statix = run "statix" [ pkgs.statix ] "statix check .";
  deadnix = run "deadnix" [ pkgs.deadnix ] "deadnix --fail .";
  options = self.packages.x86_64-linux.docs;
  failures = textFile "failures" (
    lib.concatStrings (
      lib.mapAttrsToList (
        name: case:
        assert lib.assertMsg (lib.elem case.message (
          failed case.module
        )) "${name}: expected '${case.message}', got ${builtins.toJSON (failed case.module)}";
        "${name}\n"
      ) cases.failing
    )
  );

  # Building a settings file runs `pascaline config check` on it.
  settings = textFile "settings" (
    lib.concatLines (
      lib.concatMap settingsOf (
        lib.attrValues self.nixosConfigurations ++ map system (lib.attrValues cases.working)
      )
    )
  );

  # The units as NixOS writes them say what those in tests/systemd/root say, which a real systemd has run.
  units =
    let
      folder = ../systemd/root/etc/systemd/system;
      inherit ((system ../systemd/host.nix).config.systemd) units;
      linesOf = lib.splitString "\n";
      serviceLines =
        text:
        lib.filter (line: line != "" && !lib.hasInfix builtins.storeDir line) (
          linesOf (lib.last (lib.splitString "[Service]" text))
        );
      missing = lib.concatMap (
        file:
        map (line: "${file}: ${line}") (
          lib.subtractLists (linesOf units.${file}.text) (serviceLines (lib.readFile (folder + "/${file}")))
        )
      ) (lib.filter (lib.hasSuffix ".service") (lib.attrNames (builtins.readDir folder)));
    in
    textFile "units" (
      lib.throwIfNot (missing == [ ]) "not in NixOS' units: ${lib.concatStringsSep "; " missing}" ""
    );
}
// lib.mapAttrs' (
  name: host: lib.nameValuePair "host-${name}" (evaluates name host)
) self.nixosConfigurations
// lib.mapAttrs' (
  name: module: lib.nameValuePair "case-${name}" (evaluates name (system module))
) cases.working
