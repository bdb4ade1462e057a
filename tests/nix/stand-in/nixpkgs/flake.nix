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
      legacyPackages =
        lib.genAttrs
          [
            "x86_64-linux"
            "aarch64-linux"
            "aarch64-darwin"
            "x86_64-darwin"
          ]
          (
            system:
            if lib.hasSuffix "darwin" system then
              import ./darwin.nix { inherit lib system; }
            else
              import ./. { inherit system; }
          );
    };
}
