# Stands for the nixpkgs input: its lib, and a nixosSystem that evaluates with the stand-in options.
{
  outputs =
    _:
    let
      lib = import "@lib@";
      standIn = import "@repository@/tests/nix/stand-in.nix" { inherit lib; };
    in
    {
      lib = lib // {
        nixosSystem =
          { modules, ... }:
          let
            evaluated = lib.evalModules {
              modules = [
                standIn.module
                standIn.driverModule
              ]
              ++ modules;
              specialArgs = {
                inherit (standIn) pkgs;
                modulesPath = "@repository@/tests/nix/stand-in";
              };
            };
          in
          lib.recursiveUpdate evaluated {
            config.system.build.toplevel = derivation {
              name = "toplevel";
              system = "x86_64-linux";
              builder = "/bin/sh";
              units = builtins.unsafeDiscardStringContext (
                builtins.toJSON (lib.mapAttrs (_: s: s.serviceConfig) evaluated.config.systemd.services)
              );
            };
          };
      };
      legacyPackages.x86_64-linux = import ./. { system = "x86_64-linux"; };
    };
}
