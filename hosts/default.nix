# From the inventory to systems: `moduleOf` derives one host's configuration from the whole fleet, the rest wraps it.
{ lib }:
let
  inherit (import ../modules/defaults.nix) ports;

  hostDefaults = {
    address = null;
    network = null;
    profile = null;
    gpu = null;
    instances = [ ];
    roles = [ ];
    modules = [ ];
  };
  fleetDefaults = {
    models = { };
    instances = { };
    alertWebhook = null;
    apiKeyFile = null;
    clients = null;
    grafanaClients = [ ];
    grafanaPasswordFile = null;
  };
  everyone = "everyone";
  # Defaults of each hardware profile.
  profileGpus.c240g5 = {
    card = "tesla-p100";
    capability = "6.0";
  };
  profiles = map (lib.removeSuffix ".nix") (lib.attrNames (builtins.readDir ./profiles));
  complete =
    fleet:
    lib.mapAttrs (
      _: host: hostDefaults // { gpu = profileGpus.${toString (host.profile or null)} or null; } // host
    ) fleet.hosts;

  oneOf = allowed: "must be one of: ${lib.concatStringsSep ", " allowed}";
  # Names that are not allowed at their place, each as a sentence.
  unknown =
    what: allowed: names:
    map (name: "fleet: ${what} '${name}', ${oneOf allowed}") (lib.subtractLists allowed names);

  # The source of a host's address: its network (DHCP), or the interface that gets it.
  networkProblems =
    name: host:
    let
      interface = "the interface that gets it, for example { name = \"enp94s0f0\"; } (or mac, or driver; \"ip -brief link\" on the host lists them)";
    in
    if host.network == null then
      [
        "fleet: host ${name} has no network, must say where its address ${toString host.address} comes from: \"dhcp\" where the network hands it out, else ${interface}"
      ]
    else if lib.isAttrs host.network then
      unknown "network of host ${name} has an unknown key" [ "driver" "mac" "name" "prefixLength" ] (
        lib.attrNames host.network
      )
    else
      lib.optional (
        host.network != "dhcp"
      ) "fleet: host ${name} has network '${toString host.network}', must be \"dhcp\", or ${interface}";

  # Who may use a service: a list of addresses and networks, or everyone.
  sourceProblems =
    key: sources:
    map
      (
        source:
        "fleet: ${key} has '${toString source}', must be IPv4 addresses or networks, for example [ \"10.0.0.0/8\" ], or \"everyone\""
      )
      (
        lib.filter (source: builtins.match "[0-9]+(\\.[0-9]+){3}(/[0-9]+)?" (toString source) == null) (
          if
            lib.elem sources [
              null
              everyone
            ]
          then
            [ ]
          else
            lib.toList sources
        )
      );
  clientProblems =
    fleet:
    let
      routers = lib.attrNames (withRole "router" (complete fleet));
    in
    sourceProblems "clients" fleet.clients
    ++ sourceProblems "grafanaClients" fleet.grafanaClients
    ++
      lib.optional (routers != [ ] && fleet.clients == null)
        "fleet: host ${lib.head routers} has role router and no clients are declared, must say who may use it: clients = [ \"10.0.0.0/8\" ], or \"everyone\" (with apiKeyFile), or [ ] for that host alone"
    ++ lib.optional (
      fleet.clients == everyone && fleet.apiKeyFile == null
    ) "fleet: clients are everyone, must have an API key; set apiKeyFile"
    ++
      lib.optional (fleet.grafanaClients != [ ] && fleet.grafanaPasswordFile == null)
        "fleet: grafanaClients are declared, must have a password of your own; set grafanaPasswordFile, a file on the monitoring host that grafana can read";

  problemsOfHost =
    fleet: addresses: name: host:
    let
      gpuKeys = lib.attrNames (if host.gpu == null then profileGpus.c240g5 else host.gpu);
    in
    unknown "host ${name} names instance" (lib.attrNames (fleet.instances or { })) host.instances
    ++ unknown "host ${name} names role" [ "monitoring" "router" ] host.roles
    ++ unknown "host ${name} has profile" profiles (lib.optional (host.profile != null) host.profile)
    ++ unknown "host ${name} has an unknown key" (lib.attrNames hostDefaults) (
      lib.attrNames fleet.hosts.${name}
    )
    # Firewall rules and /etc/hosts are derived from it.
    ++
      lib.optional (builtins.match "[0-9]+(\\.[0-9]+){3}" (toString host.address) == null)
        "fleet: host ${name} has address '${toString host.address}', must be an IPv4 address, for example 10.10.1.1"
    ++ networkProblems name host
    ++ lib.optional (
      host.address != null && lib.count (address: address == host.address) addresses > 1
    ) "fleet: address ${host.address} of host ${name} is used twice"
    ++
      lib.optional (gpuKeys != lib.attrNames profileGpus.c240g5)
        "fleet: gpu of host ${name} has the keys ${lib.concatStringsSep ", " gpuKeys}, must have card and capability, for example { card = \"tesla-p4\"; capability = \"6.1\"; }";

  # Every mistake of an inventory as a sentence; empty if it has none.
  problems =
    fleet:
    let
      hosts = complete fleet;
      addresses = lib.mapAttrsToList (_: host: host.address) hosts;
      modelOf =
        name: instance:
        lib.optional (instance ? model) {
          inherit name;
          inherit (instance) model;
        };
      models = lib.concatLists (lib.mapAttrsToList modelOf (fleet.instances or { }));
    in
    unknown "unknown key" (lib.attrNames fleetDefaults ++ [ "hosts" ]) (lib.attrNames fleet)
    ++ lib.concatMap (
      { name, model }:
      unknown "instance ${name} names model" (lib.attrNames (fleet.models or { })) [ model ]
    ) models
    ++ lib.concatLists (
      lib.mapAttrsToList (
        name: instance:
        map (
          key:
          "fleet: instance ${name} sets settings.${key}, must leave ports to the fleet, whose scrape targets, workers and firewall rules follow them"
        ) (lib.intersectLists [ "port" "agent_port" ] (lib.attrNames (instance.settings or { })))
      ) (fleet.instances or { })
    )
    ++ clientProblems (fleetDefaults // fleet)
    ++ lib.concatLists (lib.mapAttrsToList (problemsOfHost fleet addresses) hosts);

  profilePath = profile: ./profiles + "/${profile}.nix";

  withRole = role: hosts: lib.filterAttrs (_: host: lib.elem role host.roles) hosts;
  serving = lib.filterAttrs (_: host: host.instances != [ ]);

  portsOf = index: {
    port = ports.engine + ports.between_instances * index;
    agentPort = ports.agent + ports.between_instances * index;
  };
  instancesOf = host: lib.imap0 (index: name: { inherit name; } // portsOf index) host.instances;

  perInstance =
    portName: hosts:
    lib.concatLists (
      lib.mapAttrsToList (
        hostName: host:
        map (instance: {
          instance = hostName;
          address = "${host.address}:${toString instance.${portName}}";
          labels.name = instance.name;
        }) (instancesOf host)
      ) (serving hosts)
    );

  targets = fleet: rec {
    hosts = complete fleet;
    agents = perInstance "agentPort" hosts;
    engines = perInstance "port" hosts;
    exporters = lib.mapAttrsToList (name: host: {
      instance = name;
      address = "${host.address}:${toString ports.exporter}";
    }) (lib.filterAttrs (_: host: host.gpu != null) hosts);
    workers = map (engine: "http://${engine.address}") engines;
  };

  # Metrics to the monitoring hosts, APIs to the routers, the router and Grafana to their clients, and nothing to anyone else.
  firewallRules =
    fleet: host:
    let
      hosts = complete fleet;
      addressesOf = role: lib.mapAttrsToList (_: h: h.address) (withRole role hosts);
      accept =
        sources: ports:
        lib.optionalString (sources != [ ] && ports != [ ])
          "ip saddr { ${lib.concatStringsSep ", " sources} } tcp dport { ${
            lib.concatMapStringsSep ", " toString ports
          } } accept\n";
      # One rule each: a set may not contain overlapping networks. The service's own openFirewall lets everyone in.
      acceptClients =
        role: clients: port:
        lib.optionalString (lib.elem role host.roles && lib.isList clients) (
          lib.concatMapStrings (client: accept [ client ] [ port ]) clients
        );
      inherit (fleetDefaults // fleet) clients grafanaClients;
      instances = instancesOf host;
      metricPorts =
        lib.concatMap (i: [
          i.port
          i.agentPort
        ]) instances
        ++ lib.optional (host.gpu != null) ports.exporter;
    in
    accept (addressesOf "monitoring") metricPorts
    + accept (addressesOf "router") (map (i: i.port) instances)
    + acceptClients "router" clients ports.router
    + acceptClients "monitoring" grafanaClients ports.grafana;

  # The address on which a service listens for these clients.
  listensFor = clients: {
    host = if clients == [ ] then "127.0.0.1" else "0.0.0.0";
    openFirewall = clients == everyone;
  };

  instanceConfig =
    fleet: host:
    {
      name,
      port,
      agentPort,
    }:
    lib.nameValuePair name (
      lib.recursiveUpdate {
        inherit (fleetDefaults // fleet) apiKeyFile;
        settings = {
          host = "0.0.0.0";
          agent_host = "0.0.0.0";
          inherit port;
          agent_port = agentPort;
        }
        # The firewall lets in only the fleet's routers and monitoring hosts.
        // lib.optionalAttrs ((fleetDefaults // fleet).apiKeyFile == null) { allow_unauthenticated = true; }
        // lib.optionalAttrs (host.gpu != null) { inherit (host.gpu) card; };
      } fleet.instances.${name}
    );

  moduleOf =
    fleet: name:
    let
      found = problems fleet;
      host = if found != [ ] then throw (lib.concatStringsSep "\n" found) else (complete fleet).${name};
      all = targets fleet;
      whole = fleetDefaults // fleet;
      models = lib.unique (
        lib.filter (model: model != null) (
          map (instance: fleet.instances.${instance}.model or null) host.instances
        )
      );
    in
    {
      imports = lib.optional (host.profile != null) (profilePath host.profile) ++ host.modules;
      networking = {
        hostName = name;
        hosts = lib.mapAttrs' (other: h: lib.nameValuePair h.address [ other ]) (complete fleet);
        nftables.enable = true;
        firewall.extraInputRules = firewallRules fleet host;
      };
      hardware.pascaline.network = lib.optionalAttrs (lib.isAttrs host.network) (
        host.network // { inherit (host) address; }
      );
      hardware.pascaline.driver = lib.mkIf (host.gpu != null) {
        enable = true;
        computeCapability = host.gpu.capability;
      };
      services.pascaline = {
        models = lib.genAttrs models (model: fleet.models.${model});
        instances = lib.listToAttrs (map (instanceConfig fleet host) (instancesOf host));
        exporter = lib.mkIf (host.gpu != null) {
          enable = true;
          host = "0.0.0.0";
        };
        monitoring = lib.mkIf (lib.elem "monitoring" host.roles) {
          enable = true;
          inherit (all) agents engines exporters;
          alertmanager.webhookUrl = whole.alertWebhook;
          grafana = listensFor whole.grafanaClients // {
            port = ports.grafana;
          };
        };
        router = lib.mkIf (lib.elem "router" host.roles) (
          listensFor whole.clients
          // {
            enable = true;
            port = ports.router;
            inherit (all) workers;
            inherit (whole) apiKeyFile;
          }
        );
      };
      services.grafana.settings.security.admin_password = lib.mkIf (
        lib.elem "monitoring" host.roles && whole.grafanaPasswordFile != null
      ) "$__file{${whole.grafanaPasswordFile}}";
    };
in
{
  inherit
    problems
    targets
    firewallRules
    moduleOf
    ;

  # fleet, { nixosSystem, modules } -> nixosConfigurations
  nixosConfigurations =
    fleet:
    { nixosSystem, modules }:
    lib.mapAttrs (
      name: _:
      nixosSystem {
        system = "x86_64-linux";
        modules = modules ++ [ (moduleOf fleet name) ];
      }
    ) fleet.hosts;

  # fleet, { nixpkgs, modules } -> a raw Colmena hive
  colmena =
    fleet:
    { nixpkgs, modules }:
    {
      # Colmena reads the platform from an attribute about which nixpkgs warns.
      meta.nixpkgs = nixpkgs // {
        inherit (nixpkgs.stdenv.hostPlatform) system;
      };
      defaults.imports = modules;
    }
    // lib.mapAttrs (name: host: {
      imports = [ (moduleOf fleet name) ];
      deployment.targetHost = host.address;
      deployment.tags = host.roles ++ lib.optional (host.gpu != null) "gpu";
    }) (complete fleet);
}
