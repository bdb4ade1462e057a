# Stands for the function behind `nixosSystem`, which Colmena imports by this path: evaluates with the stand-in options.
{
  modules,
  specialArgs ? { },
  ...
}:
let
  lib = import "@lib@";
  standIn = import "@repository@/tests/nix/stand-in.nix" { inherit lib; };
  unitText = import "@repository@/tests/nix/unit-text.nix" { inherit lib; };
  evaluated = lib.evalModules {
    modules = [
      standIn.module
      standIn.nixosModule
    ]
    ++ modules;
    specialArgs = {
      inherit (standIn) pkgs;
    }
    // specialArgs;
  };
  units = lib.mapAttrs' (
    name: service: lib.nameValuePair "${name}.service" { inherit (unitText name service) text; }
  ) evaluated.config.systemd.services;
in
# Said where a system is evaluated, as listing the flake's outputs must not.
lib.recursiveUpdate (builtins.trace "a system is evaluated" evaluated) {
  config.systemd = { inherit units; };
  config.system.build.toplevel = derivation {
    name = "toplevel";
    system = "x86_64-linux";
    builder = "/bin/sh";
    units = builtins.unsafeDiscardStringContext (
      builtins.toJSON (lib.mapAttrs (_: unit: unit.text) units)
    );
  };
}
