# Prometheus, Alertmanager and Grafana over a fleet: targets from options, rules and dashboards from the files beside this one.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  inherit (import ../defaults.nix) ports;
  cfg = config.services.pascaline.monitoring;
  inherit (config.services) prometheus grafana;
  inherit (prometheus) alertmanager;
  inherit (import ../listen.nix { inherit lib; }) isLoopback openedIsReachable reachedAt;

  # The host's own Grafana settings override our option's default; they conflict with our option only if both are set.
  overridable = option: if option.highestPrio < 1000 then lib.id else lib.mkDefault;
  grafanaOptions = options.services.pascaline.monitoring.grafana;
  grafanaServer = grafana.settings.server;
  dataSource = "pascaline";

  # Alertmanager takes one whole configuration: the host's own replaces ours, and an assertion forbids webhookUrl beside it.
  ownAlertConfiguration =
    options.services.prometheus.alertmanager.configuration.highestPrio < 1000
    || alertmanager.configText != null;
  clusterFlag = "--cluster.listen-address=";
  jobNames = map (job: job.job_name) prometheus.scrapeConfigs;
  repeatedJobs = lib.unique (
    lib.filter (name: lib.count (other: other == name) jobNames > 1) jobNames
  );
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
        description = "Name of the host, which becomes the label `host` of its series.";
      };
      address = mkOption {
        type = types.str;
        example = "gpu-1.example.org:${toString ports.exporter}";
        description = "Address and port to scrape.";
      };
      labels = mkOption {
        type = types.attrsOf types.str;
        default = { };
        example = {
          name = "emily";
        };
        description = "Further labels of every series from this target. The dashboards distinguish instances by `name`.";
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
      description = what;
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
  grafanaSecret = "${grafana.dataDir}/secret-key";
in
{
  imports = [ ../common.nix ];

  options.services.pascaline.monitoring = {
    enable = lib.mkEnableOption "Prometheus, its rules, Alertmanager and Grafana for pascaline hosts";

    exporters = targetsOption "GPU exporters to scrape, one per host (`services.pascaline.exporter`)." ports.exporter;
    agents = targetsOption "Agents to scrape, one per instance: the supervisor's own metrics, at `settings.agent_port`." ports.agent;
    engines = targetsOption "Engines to scrape, one per instance: the metrics of SGLang or llama.cpp, at `settings.port`." ports.engine;
    nodes = targetsOption "node_exporters to scrape, for a host's processors, memory and disks (`services.prometheus.exporters.node`)." ports.node_exporter;

    scrapeInterval = mkOption {
      type = types.str;
      default = "15s";
      example = "30s";
      description = "How often every target is scraped and every rule evaluated. {option}`services.prometheus.globalConfig` overrides it.";
    };

    retention = mkOption {
      type = types.str;
      default = "30d";
      example = "1y";
      description = "How long Prometheus keeps series; {option}`services.prometheus.retentionTime` overrides it. Alerts that compare an instance with its own past need a week.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether the firewall opens Prometheus' port to everyone. {option}`services.prometheus.listenAddress` must then be no loopback address. Prometheus has no authentication.";
    };

    alertmanager = {
      enable = mkOption {
        type = types.bool;
        default = true;
        example = false;
        description = "Whether to run Alertmanager on this host and send it the alerts of pascaline's rules.";
      };
      webhookUrl = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "http://127.0.0.1:9099/alerts";
        description = "URL that alerts are posted to. Leave it unset if {option}`services.prometheus.alertmanager.configuration` or {option}`services.prometheus.alertmanager.configText` has your own receivers. One of the three must be set.";
      };
    };

    grafana = {
      enable = mkOption {
        type = types.bool;
        default = true;
        example = false;
        description = "Whether to run Grafana on this host, with pascaline's dashboards and this Prometheus as a data source.";
      };
      host = mkOption {
        type = types.str;
        default = "127.0.0.1";
        example = "0.0.0.0";
        description = "Address that Grafana listens on. If it is not a loopback address, {option}`services.grafana.settings.security.admin_password` must be your own.";
      };
      port = mkOption {
        type = types.port;
        default = ports.grafana;
        example = 3001;
        description = "Port that Grafana listens on; `services.grafana.settings.server.http_port` overrides it.";
      };
      openFirewall = mkOption {
        type = types.bool;
        default = false;
        example = true;
        description = "Whether the firewall opens Grafana's port to everyone. {option}`services.pascaline.monitoring.grafana.host` must then be no loopback address.";
      };
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.alertmanager.enable -> cfg.alertmanager.webhookUrl != null || ownAlertConfiguration;
        message = "services.pascaline.monitoring.alertmanager.webhookUrl: not set, so that no one would hear of an alert; set it, or services.prometheus.alertmanager.configuration or configText, or services.pascaline.monitoring.alertmanager.enable = false";
      }
      {
        assertion =
          cfg.alertmanager.enable -> cfg.alertmanager.webhookUrl == null || !ownAlertConfiguration;
        message = "services.pascaline.monitoring.alertmanager.webhookUrl: set beside a configuration of your own in services.prometheus.alertmanager, must be one of the two; give your configuration a receiver with webhook_configs and remove webhookUrl";
      }
      {
        # Alertmanager exits at once if it is given twice.
        assertion = lib.count (lib.hasPrefix clusterFlag) alertmanager.extraFlags <= 1;
        message = "services.prometheus.alertmanager.extraFlags: ${clusterFlag} is there twice, must be there once; remove yours, or replace the list with lib.mkForce";
      }
      {
        assertion = repeatedJobs == [ ];
        message = "services.prometheus.scrapeConfigs: job_name ${lib.concatStringsSep ", " repeatedJobs} is there twice, must be there once; rename your own job, or leave out its targets here";
      }
      {
        # The value of NixOS' option without a definition.
        assertion =
          cfg.grafana.enable
          ->
            isLoopback grafanaServer.http_addr
            || grafana.settings.security.admin_password or "admin" != "admin";
        message = "services.grafana.settings.security.admin_password: Grafana listens on ${grafanaServer.http_addr} with the password that everyone knows, must be one of your own; set it to \"$__file{/etc/pascaline/grafana-password}\", a file that only grafana can read";
      }
      (openedIsReachable {
        option = "services.pascaline.monitoring.grafana.openFirewall";
        opened = cfg.grafana.enable && cfg.grafana.openFirewall;
        what = "Grafana";
        host = grafanaServer.http_addr;
        hostOption = "services.pascaline.monitoring.grafana.host";
      })
      (openedIsReachable {
        option = "services.grafana.openFirewall";
        opened = cfg.grafana.enable && grafana.openFirewall or false;
        what = "Grafana";
        host = grafanaServer.http_addr;
        hostOption = "services.pascaline.monitoring.grafana.host";
      })
      (openedIsReachable {
        option = "services.pascaline.monitoring.openFirewall";
        opened = cfg.openFirewall;
        what = "Prometheus";
        host = prometheus.listenAddress;
        hostOption = "services.prometheus.listenAddress";
      })
      (openedIsReachable {
        option = "services.prometheus.alertmanager.openFirewall";
        opened = cfg.alertmanager.enable && alertmanager.openFirewall;
        what = "Alertmanager";
        host = alertmanager.listenAddress;
        hostOption = "services.prometheus.alertmanager.listenAddress";
      })
    ];

    services = {
      pascaline.ports = {
        "services.prometheus.port" = prometheus.port;
      }
      // lib.optionalAttrs cfg.alertmanager.enable {
        "services.prometheus.alertmanager.port" = alertmanager.port;
      }
      // lib.optionalAttrs cfg.grafana.enable {
        "services.pascaline.monitoring.grafana.port" = grafanaServer.http_port;
      };

      prometheus = {
        enable = true;
        listenAddress = lib.mkDefault "127.0.0.1";
        retentionTime = lib.mkDefault cfg.retention;
        globalConfig = {
          scrape_interval = lib.mkDefault cfg.scrapeInterval;
          evaluation_interval = lib.mkDefault cfg.scrapeInterval;
        };
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
            { targets = [ "${reachedAt alertmanager.listenAddress}:${toString alertmanager.port}" ]; }
          ];
        };
        alertmanager = lib.mkIf cfg.alertmanager.enable {
          enable = true;
          listenAddress = lib.mkDefault "127.0.0.1";
          # No cluster of one: Alertmanager exits at once when it joins it on a host with public addresses only.
          extraFlags = lib.mkIf (alertmanager.clusterPeers == [ ]) [ clusterFlag ];
          configuration = lib.mkIf (cfg.alertmanager.webhookUrl != null) (
            lib.mkDefault {
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
            }
          );
        };
      };

      grafana = lib.mkIf cfg.grafana.enable {
        enable = true;
        settings.server = {
          http_addr = overridable grafanaOptions.host cfg.grafana.host;
          http_port = overridable grafanaOptions.port cfg.grafana.port;
        };
        # It encrypts the passwords of data sources. NixOS has no default, so that every host has its own key.
        settings.security.secret_key = lib.mkDefault "$__file{${grafanaSecret}}";
        provision = {
          enable = true;
          datasources.settings.datasources = [
            {
              name = dataSource;
              type = "prometheus";
              uid = dataSource;
              url = "http://${reachedAt prometheus.listenAddress}:${toString prometheus.port}";
              # Not the default data source: Grafana refuses to start with two, and the host may have its own. The dashboards choose by name.
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

    networking.firewall.allowedTCPPorts =
      lib.optional (cfg.grafana.enable && cfg.grafana.openFirewall) grafanaServer.http_port
      ++ lib.optional cfg.openFirewall prometheus.port;
  };
}
