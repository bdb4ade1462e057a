{
  description = "A fleet of Pascal hosts";

  inputs.pascaline.url = "github:pascaline/pascaline";

  outputs =
    { pascaline, ... }:
    let
      fleet = import ./fleet.nix;
      modules = [
        pascaline.nixosModules.default
        ./common.nix
      ];
      inherit (pascaline.inputs) nixpkgs;
    in
    {
      nixosConfigurations = pascaline.lib.nixosConfigurations fleet {
        inherit (nixpkgs.lib) nixosSystem;
        inherit modules;
      };
      colmenaHive = pascaline.lib.colmenaHive fleet { inherit modules; };
    };
}
