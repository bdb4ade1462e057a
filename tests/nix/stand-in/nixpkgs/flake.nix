# Stands for the nixpkgs input: its lib, and a nixosSystem that evaluates with the stand-in options.
{
  outputs =
    _:
    let
      lib = import "@lib@";
    in
    {
      lib = lib // {
        nixosSystem = import ./nixos/lib/eval-config.nix;
      };
      legacyPackages.x86_64-linux = import ./. { system = "x86_64-linux"; };
    };
}
