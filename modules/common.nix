# Shared by all pascaline units: the packages, the user, the persistent folders, and the host's ports.
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
    package = lib.mkPackageOption pkgs "pascaline" {
      example = "pkgs.pascaline-app";
      extraDescription = "It is the control plane: the `pascaline` program without torch. `pkgs.pascaline-app` holds the built-in model too.";
    };

    enginePackage = lib.mkPackageOption pkgs "pascaline-engine" {
      example = "pkgs.pascaline-engine.override { torchFlavour = \"cu118\"; }";
      extraDescription = "It is the Python environment of SGLang, torch and the plugin, whose `bin/python` runs the engine.";
    };

    user = mkOption {
      type = types.str;
      default = "pascaline";
      example = "inference";
      description = "User that every unit runs as. The default one is created; any other must be declared in {option}`users.users`.";
    };

    stateDir = mkOption {
      type = types.path;
      default = "/var/lib/pascaline";
      example = "/data/pascaline";
      description = "Folder that holds the model store. Put it on a data partition if the root partition is small or temporary.";
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
      description = "Port of every listener on this host, by the option that sets it; the modules that declare a listener add its port.";
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
      assertions = [
        {
          assertion = config.users.users ? ${cfg.user};
          message = "services.pascaline.user: no user '${cfg.user}' is declared, must be one of this host; declare users.users.${cfg.user} with its group, or leave the option out";
        }
      ];

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
