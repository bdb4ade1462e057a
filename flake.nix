{
  description = "Language models on the NVIDIA GPUs that the frameworks dropped: drivers, CUDA 11.8, SGLang, supervision and monitoring, declared";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    # The last release with CUDA 11.8, and used for nothing else.
    nixpkgs-cuda.url = "github:NixOS/nixpkgs/nixos-25.05";
    # Only its function that turns a hive into what the colmena program evaluates.
    colmena = {
      url = "github:zhaofengli/colmena";
      flake = false;
    };
  };

  outputs =
    {
      self,
      nixpkgs,
      nixpkgs-cuda,
      colmena,
    }:
    let
      inherit (nixpkgs) lib;
      # The hosts' platform; the machines of their administrators may have others.
      system = "x86_64-linux";
      forAdministrators =
        of:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" "aarch64-darwin" "x86_64-darwin" ] (
          system: of nixpkgs.legacyPackages.${system}
        );
      unfree = import ./python/unfree.nix { inherit lib; };
      overlay = import ./python/overlay.nix { inherit nixpkgs-cuda; };
      pkgs = import nixpkgs {
        inherit system;
        overlays = [ overlay ];
        config = unfree.host;
      };
      modules = [
        self.nixosModules.default
        ./hosts/common.nix
      ];
      fleetLib = import ./hosts { inherit lib; };
      fleet = import ./hosts/fleet.nix;
      colmenaHive =
        fleet:
        { modules }:
        import "${colmena}/src/nix/hive/eval.nix" {
          rawHive = fleetLib.colmena fleet {
            nixpkgs = pkgs;
            inherit modules;
          };
          hermetic = true;
        };
      packageSet = {
        # The key makes it count once, whichever of our modules are imported.
        key = "pascaline:packages";
        nixpkgs.overlays = [ overlay ];
        nixpkgs.config = unfree.host;
      };
    in
    {
      overlays.default = overlay;
      lib = fleetLib // {
        # fleet, { modules } -> what the colmena program evaluates
        inherit colmenaHive;
      };

      nixosModules =
        lib.mapAttrs
          (_: module: {
            imports = [
              module
              packageSet
            ];
          })
          {
            default = ./modules;
            cloudlab = ./modules/cloudlab.nix;
            cuda = ./modules/cuda.nix;
            driver = ./modules/driver.nix;
            exporter = ./modules/exporter.nix;
            inference = ./modules/inference.nix;
            models = ./modules/models.nix;
            monitoring = ./modules/monitoring;
            network = ./modules/network.nix;
            router = ./modules/router.nix;
          };

      nixosConfigurations = fleetLib.nixosConfigurations fleet {
        inherit (lib) nixosSystem;
        inherit modules;
      };
      colmenaHive = colmenaHive fleet { inherit modules; };

      packages.${system} = {
        inherit (pkgs)
          pascaline
          pascaline-engine
          pascaline-router
          sglang-pascal-kernels
          llama-cpp-pascal
          ;
        default = pkgs.pascaline;
        docs = import ./tests/nix/options-doc.nix { inherit pkgs; };
      };

      apps.${system}.default = {
        type = "app";
        program = lib.getExe pkgs.pascaline-app;
        meta.description = "pascaline with the engine beside it: nix run . -- serve";
      };

      devShells =
        forAdministrators (pkgs: {
          default = import ./python/shell.nix { inherit pkgs; };
        })
        // {
          ${system}.default = import ./python/shell.nix { inherit pkgs; };
        };
      formatter = forAdministrators (pkgs: pkgs.nixfmt-tree);
      checks.${system} = import ./tests/nix/checks.nix { inherit self pkgs; };
      # Apart from the checks, since they need KVM: nix build .#vm-tests.serve .#vm-tests.fleet
      legacyPackages.${system}.vm-tests = import ./tests/nix/vm.nix { inherit pkgs; };

      templates = rec {
        default = single;
        single = {
          path = ./templates/single;
          description = "One host with a Pascal card that serves a model";
        };
        fleet = {
          path = ./templates/fleet;
          description = "Several hosts: an inventory, of which systems, scrape targets, router and firewall follow";
        };
      };
    };
}
