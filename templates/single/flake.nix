{
  description = "A host with a Pascal card that serves a model";

  inputs.pascaline.url = "github:pascaline/pascaline";

  outputs =
    { pascaline, ... }:
    {
      nixosConfigurations.box = pascaline.inputs.nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          pascaline.nixosModules.default
          ./configuration.nix
          ./hardware-configuration.nix
        ];
      };
    };
}
