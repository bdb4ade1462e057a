# What every pascaline unit shares: the packages, the user, the folders that outlive a boot, and the host's ports.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline;
  clashes = lib.filterAttrs (_: users: lib.length users > 1) (
    lib.groupBy (user: toString cfg.ports.${user}) (lib.attrNames cfg.ports)
  );
in
{
  options.services.pascaline = {
    package = mkOption {
      type = types.package;
      default = pkgs.pascaline;
      defaultText = lib.literalExpression "pkgs.pascaline";
      example = lib.literalExpression "pkgs.pascaline-app";
      description = "The control plane: the `pascaline` program, without torch. `pkgs.pascaline-app` has the built-in model too.";
    };

    enginePackage = mkOption {
      type = types.package;
      default = pkgs.pascaline-engine;
      defaultText = lib.literalExpression "pkgs.pascaline-engine";
      example = lib.literalExpression "pkgs.pascaline-engine.override { torchFlavour = \"cu118\"; }";
      description = "The Python environment with SGLang, torch and the plugin; its `bin/python` runs the engine.";
    };

    user = mkOption {
      type = types.str;
      default = "pascaline";
      example = "inference";
      description = "System user of every unit. It is created here when it has the default name.";
    };

    stateDir = mkOption {
      type = types.path;
      default = "/var/lib/pascaline";
      example = "/data/pascaline";
      description = "Folder of the model store. On hosts whose root is small or short-lived, put it on a data partition.";
    };

    active = mkOption {
      type = types.bool;
      default = false;
      internal = true;
      description = "Whether any pascaline unit is declared on this host; set by the modules that declare one.";
    };

    ports = mkOption {
      type = types.attrsOf types.port;
      default = { };
      internal = true;
      description = "Port of every listener on this host, by the option that says it; set by the modules that declare one.";
    };
  };

  config = lib.mkMerge [
    {
      assertions = lib.mapAttrsToList (port: users: {
        assertion = false;
        message = "port ${port} is used by ${lib.concatStringsSep " and " users}, must be used once; give one of them another port";
      }) clashes;
    }
    (lib.mkIf cfg.active {
      users.users = lib.mkIf (cfg.user == "pascaline") {
        pascaline = {
          isSystemUser = true;
          group = "pascaline";
          home = cfg.stateDir;
          description = "pascaline inference";
        };
      };
      users.groups = lib.mkIf (cfg.user == "pascaline") { pascaline = { }; };

      environment.systemPackages = [ cfg.package ];
    })
  ];
}
