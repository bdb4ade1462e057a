# Prometheus, Alertmanager and Grafana over a fleet: targets from options, rules and dashboards from the files beside this one.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline.monitoring;
  filesEndingIn =
    suffix: folder:
    map (file: folder + "/${file}") (
      lib.filter (lib.hasSuffix suffix) (lib.attrNames (builtins.readDir folder))
    );
  target = types.submodule {
    options = {
      instance = mkOption {
        type = types.str;
        example = "gpu-1";
        description = "Host name, which becomes the label `host`.";
      };
      address = mkOption {
        type = types.str;
        example = "gpu-1.example.org:9836";
        description = "Address and port to scrape.";
      };
      labels = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example = {
          name = "emily";
        };
        description = "Further labels of all series from this target.";
      };
    };
  };
  targetsOption =
    what: port:
    mkOption {
      type = types.listOf target;
      default = [ ];
      example = [
        {
          instance = "gpu-1";
          address = "gpu-1.example.org:${toString port}";
        }
      ];
      description = "${what} to scrape.";
    };
  job = name: targets: {
    job_name = name;
    static_configs = map (t: {
      targets = [ t.address ];
      labels = {
        host = t.instance;
      }
      // t.labels;
    }) targets;
  };
  grafanaSecret = "${config.services.grafana.dataDir}/secret-key";
in
{
  imports = [ ../common.nix ];

  options.services.pascaline.monitoring = {
    enable = lib.mkEnableOption "Prometheus, its rules, Alertmanager and Grafana for pascaline hosts";

    exporters = targetsOption "GPU exporters" 9836;
    agents = targetsOption "Agents" 30001;
    engines = targetsOption "Engines (their own metrics)" 30000;
    nodes = targetsOption "node_exporters" 9100;

    scrapeInterval = mkOption {
      type = types.str;
      default = "15s";
      example = "30s";
      description = "How often everything is scraped.";
    };

    retention = mkOption {
      type = types.str;
      default = "30d";
      example = "1y";
      description = "How long series are kept. The alerts against an instance's own baseline look a week back.";
    };

    alertmanager = {
      enable = mkOption {
        type = types.bool;
        default = true;
        example = false;
        description = "Whether to run Alertmanager here and send alerts to it.";
      };
      webhookUrl = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "http://127.0.0.1:9099/alerts";
        description = "Where alerts are posted. It, or {option}`services.prometheus.alertmanager.configuration` with receivers of your own, must be set.";
      };
    };

    grafana = {
      enable = mkOption {
        type = types.bool;
        default = true;
        example = false;
        description = "Whether to run Grafana with the dashboards here.";
      };
      host = mkOption {
        type = types.str;
        default = "127.0.0.1";
        example = "0.0.0.0";
        description = "Address that Grafana listens on.";
      };
      port = mkOption {
        type = types.port;
        default = 3000;
        example = 3001;
        description = "Port that Grafana listens on.";
      };
      openFirewall = mkOption {
        type = types.bool;
        default = false;
        example = true;
        description = "Whether to open Grafana's port.";
      };
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion =
          cfg.alertmanager.enable
          ->
            cfg.alertmanager.webhookUrl != null
            || config.services.prometheus.alertmanager.configuration != null;
        message = "services.pascaline.monitoring.alertmanager.webhookUrl: not set, so that no one would hear of an alert; set it, or services.prometheus.alertmanager.configuration, or services.pascaline.monitoring.alertmanager.enable = false";
      }
    ];

    services = {
      pascaline.ports = {
        "services.prometheus.port" = config.services.prometheus.port;
      }
      // lib.optionalAttrs cfg.alertmanager.enable {
        "services.prometheus.alertmanager.port" = config.services.prometheus.alertmanager.port;
      }
      // lib.optionalAttrs cfg.grafana.enable {
        "services.pascaline.monitoring.grafana.port" = cfg.grafana.port;
      };

      prometheus = {
        enable = true;
        listenAddress = lib.mkDefault "127.0.0.1";
        retentionTime = cfg.retention;
        globalConfig.scrape_interval = cfg.scrapeInterval;
        globalConfig.evaluation_interval = cfg.scrapeInterval;
        ruleFiles = filesEndingIn ".yaml" ./rules;
        scrapeConfigs = map (entry: job entry.name entry.targets) (
          lib.filter (entry: entry.targets != [ ]) [
            {
              name = "pascaline-exporter";
              targets = cfg.exporters;
            }
            {
              name = "pascaline-agent";
              targets = cfg.agents;
            }
            {
              name = "pascaline-engine";
              targets = cfg.engines;
            }
            {
              name = "node";
              targets = cfg.nodes;
            }
          ]
        );
        alertmanagers = lib.optional cfg.alertmanager.enable {
          static_configs = [
            { targets = [ "127.0.0.1:${toString config.services.prometheus.alertmanager.port}" ]; }
          ];
        };
        alertmanager = lib.mkIf cfg.alertmanager.enable {
          enable = true;
          listenAddress = lib.mkDefault "127.0.0.1";
          # No cluster of one: joining it, Alertmanager ends at once on a host that has public addresses only.
          extraFlags = lib.mkDefault [ "--cluster.listen-address=" ];
          configuration = lib.mkIf (cfg.alertmanager.webhookUrl != null) {
            route = {
              receiver = "webhook";
              group_by = [
                "alertname"
                "host"
              ];
              group_wait = "30s";
              repeat_interval = "4h";
            };
            inhibit_rules = lib.importJSON ./inhibit_rules.json;
            receivers = [
              {
                name = "webhook";
                webhook_configs = [ { url = cfg.alertmanager.webhookUrl; } ];
              }
            ];
          };
        };
      };

      grafana = lib.mkIf cfg.grafana.enable {
        enable = true;
        settings.server = {
          http_addr = cfg.grafana.host;
          http_port = cfg.grafana.port;
        };
        # It encrypts what is typed in as a data source's password; NixOS gives none, so that every host has its own.
        settings.security.secret_key = lib.mkDefault "$__file{${grafanaSecret}}";
        provision = {
          enable = true;
          datasources.settings.datasources = [
            {
              name = "Prometheus";
              type = "prometheus";
              uid = "prometheus";
              url = "http://127.0.0.1:${toString config.services.prometheus.port}";
              isDefault = true;
            }
          ];
          dashboards.settings.providers = [
            {
              name = "pascaline";
              options.path = pkgs.linkFarm "pascaline-dashboards" (
                map (file: {
                  name = baseNameOf file;
                  path = file;
                }) (filesEndingIn ".json" ./dashboards)
              );
            }
          ];
        };
      };
    };

    systemd.services.grafana = lib.mkIf cfg.grafana.enable {
      preStart = ''
        if [ ! -s ${grafanaSecret} ]; then
          (umask 077 && head -c 32 /dev/urandom | base64 -w 0 >${grafanaSecret})
        fi
      '';
    };

    networking.firewall.allowedTCPPorts = lib.optional (
      cfg.grafana.enable && cfg.grafana.openFirewall
    ) cfg.grafana.port;
  };
}
