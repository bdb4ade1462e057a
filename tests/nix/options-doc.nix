# Every option of our modules as one page, rendered by nixpkgs' own generator, which fails where a description is missing.
{ pkgs }:
let
  inherit (pkgs) lib;
  evaluated = lib.evalModules {
    modules = [
      ../../modules
      {
        config._module.check = false;
        options._module.args = lib.mkOption { internal = true; };
      }
    ];
    specialArgs = { inherit pkgs; };
  };
  root = toString ../..;
in
(pkgs.nixosOptionsDoc {
  options = { inherit (evaluated.options) services hardware; };
  warningsAreErrors = true;
  transformOptions =
    option:
    option
    // {
      # Declarations as paths of this repository, not of the machine that rendered them.
      declarations = map (file: lib.removePrefix "${root}/" (toString file)) option.declarations;
      visible =
        option.visible or true
        && (
          lib.hasPrefix "services.pascaline" option.name || lib.hasPrefix "hardware.pascaline" option.name
        );
    };
}).optionsCommonMark
