# One address for a fleet: SGLang's router in front of the instances' APIs.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline.router;
  defaults = import ./defaults.nix;
  exec = import ./exec.nix { inherit lib; };
  hardening = import ./hardening.nix;
  inherit (import ./listen.nix { inherit lib; }) openedIsReachable;
in
{
  imports = [ ./common.nix ];

  options.services.pascaline.router = {
    enable = lib.mkEnableOption "sglang-router, one address in front of the APIs of several instances";

    package = lib.mkPackageOption pkgs "pascaline-router" {
      example = "pkgs.pascaline-engine";
      extraDescription = "It is a Python environment whose `bin/python` can run `sglang_router.launch_router`.";
    };

    host = mkOption {
      type = types.str;
      default = "127.0.0.1";
      example = "0.0.0.0";
      description = "Address that the router's API and metrics listen on. Clients on other hosts cannot reach a loopback address.";
    };

    port = mkOption {
      type = types.port;
      default = defaults.ports.router;
      example = 8000;
      description = "Port of the router's API.";
    };

    metricsPort = mkOption {
      type = types.port;
      default = defaults.ports.router_metrics;
      example = 29000;
      description = "Port of the router's own Prometheus metrics, on `host`.";
    };

    workers = mkOption {
      type = types.listOf (types.strMatching "https?://[^ ]+");
      default = [ ];
      example = [ "http://gpu-1.example.org:${toString defaults.ports.engine}" ];
      description = "URLs of the instances' APIs that requests are sent to. In a fleet the inventory sets them.";
    };

    policy = mkOption {
      type = types.enum [
        "cache_aware"
        "power_of_two"
        "random"
        "round_robin"
      ];
      default = "cache_aware";
      example = "round_robin";
      description = "How the router chooses a worker. `cache_aware` sends a prompt to the worker whose cache holds its beginning; `power_of_two` takes the less loaded of two random workers.";
    };

    apiKeyFile = mkOption {
      type = types.nullOr types.externalPath;
      default = null;
      example = "/run/secrets/router-api-key";
      description = "File on the host with the API key of the workers, which requests to the router must carry too. It may be readable by root alone; it never enters the Nix store.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether the firewall opens the router to everyone. This needs {option}`services.pascaline.router.apiKeyFile`, and an address in {option}`services.pascaline.router.host` that is not loopback.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      (openedIsReachable {
        option = "services.pascaline.router.openFirewall";
        opened = cfg.openFirewall;
        what = "the router";
        inherit (cfg) host;
        hostOption = "services.pascaline.router.host";
      })
      {
        assertion = cfg.workers != [ ];
        message = "services.pascaline.router.workers: empty, must name at least one API, for example [ \"http://127.0.0.1:${toString defaults.ports.engine}\" ]";
      }
      {
        assertion = cfg.openFirewall -> cfg.apiKeyFile != null;
        message = "services.pascaline.router.openFirewall: the router would be open to everyone, must have an API key; set services.pascaline.router.apiKeyFile";
      }
    ];

    services.pascaline.active = true;
    services.pascaline.ports = {
      "services.pascaline.router.port" = cfg.port;
      "services.pascaline.router.metricsPort" = cfg.metricsPort;
    };
    networking.firewall.allowedTCPPorts = lib.optional cfg.openFirewall cfg.port;

    systemd.services.pascaline-router = {
      description = "Router in front of the language models (pascaline)";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [ "network-online.target" ];
      startLimitIntervalSec = 0;
      serviceConfig = hardening // {
        ExecStart = exec (
          [
            "${cfg.package}/bin/python"
            "${./run-router.py}"
            "--host"
            cfg.host
            "--port"
            cfg.port
            "--prometheus-host"
            cfg.host
            "--prometheus-port"
            cfg.metricsPort
            "--policy"
            cfg.policy
            # A draining instance says so at once: /health returns 503, and the next check takes it out. It refuses requests that
            # arrive before that with 503, and the router sends them to another worker.
            "--health-check-interval-secs"
            2
            "--health-failure-threshold"
            1
            "--health-success-threshold"
            1
            "--cb-failure-threshold"
            2
            "--cb-success-threshold"
            1
            "--cb-timeout-duration-secs"
            5
            "--worker-urls"
          ]
          ++ cfg.workers
        );
        User = config.services.pascaline.user;
        LoadCredential = lib.optional (cfg.apiKeyFile != null) "api-key:${toString cfg.apiKeyFile}";
        Restart = "always";
        RestartSec = 5;
      };
    };
  };
}
