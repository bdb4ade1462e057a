# The units that NixOS' own modules make of the Prometheus and Alertmanager options that ours set, for machines without NixOS.
# They hold what decides whether a target is scraped and an alert is sent; NixOS' sandbox of them is left out.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.prometheus;
  inherit (cfg) alertmanager;
  unit = package: stateDirectory: flags: {
    wantedBy = [ "multi-user.target" ];
    after = [ "network.target" ];
    serviceConfig = {
      ExecStart = lib.concatStringsSep " " ([ (lib.getExe package) ] ++ flags);
      Restart = "always";
      DynamicUser = true;
      StateDirectory = stateDirectory;
    };
  };
  # Every YAML reader takes JSON.
  file = value: { text = builtins.toJSON value; };
  ruleFiles = lib.listToAttrs (
    map (
      path: lib.nameValuePair "prometheus/${baseNameOf path}" { text = lib.readFile path; }
    ) cfg.ruleFiles
  );
in
{
  config = lib.mkMerge [
    (lib.mkIf cfg.enable {
      systemd.services.prometheus = unit pkgs.prometheus "prometheus2" [
        "--config.file=/etc/prometheus/prometheus.yml"
        "--storage.tsdb.path=/var/lib/prometheus2/data"
        "--storage.tsdb.retention.time=${cfg.retentionTime}"
        "--web.listen-address=${cfg.listenAddress}:${toString cfg.port}"
      ];
      environment.etc = ruleFiles // {
        "prometheus/prometheus.yml" = file {
          global = cfg.globalConfig;
          scrape_configs = cfg.scrapeConfigs;
          rule_files = map (name: "/etc/${name}") (lib.attrNames ruleFiles);
          alerting = { inherit (cfg) alertmanagers; };
        };
      };
    })
    (lib.mkIf alertmanager.enable {
      systemd.services.alertmanager = unit pkgs.prometheus-alertmanager "alertmanager" (
        alertmanager.extraFlags
        ++ [
          "--config.file=/etc/alertmanager.yml"
          "--storage.path=/var/lib/alertmanager"
          "--web.listen-address=${alertmanager.listenAddress}:${toString alertmanager.port}"
        ]
      );
      environment.etc."alertmanager.yml" = file alertmanager.configuration;
    })
  ];
}
