# Called as nixpkgs is, answers with the trimmed package set and the few names of ours that it lacks.
arguments:
import "@corepkgs@" (
  # It knows none of our unfree settings.
  removeAttrs arguments [ "config" ]
  // {
    overlays = [
      (final: _prev: {
        path = ./.;
        ugrep = final.gnugrep;
        mkShell = attributes: final.runCommand "shell" { inherit (attributes) packages; } "";
        llama-cpp = final.hello or final.gnugrep;
        nixfmt-tree = final.gnugrep;
        nixfmt-rfc-style = final.gnugrep;
        statix = final.gnugrep;
        deadnix = final.gnugrep;
        prometheus.cli = final.gnugrep;
        nixosOptionsDoc = _: { optionsCommonMark = final.gnugrep; };
        testers.runNixOSTest = test: final.writeText test.name (builtins.toJSON (builtins.attrNames test));
      })
    ]
    ++ (arguments.overlays or [ ]);
  }
)
