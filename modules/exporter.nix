# The GPU exporter: one per host, with Prometheus metrics of every GPU from NVML.
{
  config,
  lib,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline.exporter;
  defaults = import ./defaults.nix;
  exec = import ./exec.nix { inherit lib; };
  hardening = import ./hardening.nix;
  nvmlAccess = import ./nvml-access.nix;
  inherit (import ./listen.nix { inherit lib; }) openedIsReachable;
in
{
  imports = [ ./common.nix ];

  options.services.pascaline.exporter = {
    enable = lib.mkEnableOption "the exporter, which serves metrics of every GPU for Prometheus";

    host = mkOption {
      type = types.str;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = "Address that the metrics page listens on. A Prometheus on another host cannot reach a loopback address.";
    };

    port = mkOption {
      type = types.port;
      default = defaults.ports.exporter;
      example = 9837;
      description = "Port of the metrics page.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether the firewall opens the port to everyone. {option}`services.pascaline.exporter.host` must then be no loopback address. A fleet opens the port to its monitoring hosts only, without this option.";
    };

    extraFlags = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "--interval=5" ];
      description = "Further arguments of `pascaline exporter`; its `--help` lists them.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      (openedIsReachable {
        option = "services.pascaline.exporter.openFirewall";
        opened = cfg.openFirewall;
        what = "the exporter";
        inherit (cfg) host;
        hostOption = "services.pascaline.exporter.host";
      })
    ];

    services.pascaline.active = true;
    services.pascaline.ports."services.pascaline.exporter.port" = cfg.port;
    networking.firewall.allowedTCPPorts = lib.optional cfg.openFirewall cfg.port;

    systemd.services.pascaline-exporter = {
      description = "GPU metrics for Prometheus (pascaline)";
      wantedBy = [ "multi-user.target" ];
      after = [
        "network.target"
        "nvidia-persistenced.service"
      ];
      startLimitIntervalSec = 0;
      environment.LD_LIBRARY_PATH = "/run/opengl-driver/lib";
      serviceConfig =
        hardening
        // nvmlAccess
        // {
          ExecStart = exec (
            [
              (lib.getExe config.services.pascaline.package)
              "exporter"
              "--host=${cfg.host}"
              "--port=${toString cfg.port}"
            ]
            ++ cfg.extraFlags
          );
          User = config.services.pascaline.user;
          Restart = "always";
          RestartSec = 5;
          # Names of the processes that hold GPU memory, and their units, come from /proc of other users.
          ProtectProc = "default";
        };
    };
  };
}
