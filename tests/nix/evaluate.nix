# Evaluates our modules, either with nixpkgs' lib and the stand-ins or with a whole nixpkgs: { libPath, nixpkgs } -> what the tests
# ask for, as plain data.
{
  libPath,
  # Folder of a nixpkgs whose own NixOS modules stand in place of the stand-ins.
  nixpkgs ? null,
  # { file, modules }, for `besideOf`.
  besides ? null,
}:
let
  real = nixpkgs != null;
  lib = import libPath;
  standIn = import ./stand-in.nix { inherit lib; };
  fleetLib = import ../../hosts { inherit lib; };
  fleet = import ../../hosts/fleet.nix;

  withPackages =
    pkgs: modules:
    lib.evalModules {
      modules = [
        standIn.module
        standIn.nixosModule
      ]
      ++ modules;
      specialArgs = { inherit pkgs; };
    };
  withStandIns = withPackages standIn.pkgs;
  # Units of a case on a machine that lacks these packages: an error, where a unit asks for one.
  withoutPackages =
    missing: module:
    let
      pkgs = standIn.pkgs // lib.genAttrs missing (name: throw "${name} is asked for");
      inherit
        (withPackages pkgs [
          ../../modules
          module
        ])
        config
        ;
    in
    builtins.deepSeq (failed config) (
      builtins.deepSeq (map plain config.environment.systemPackages) (
        lib.attrNames (
          lib.filterAttrs (_: service: builtins.deepSeq service true) (ourServices config.systemd.services)
        )
      )
    );

  # Our packages by name only: the modules are what is looked at.
  nixpkgsWithOurs = import nixpkgs {
    system = "x86_64-linux";
    overlays = [
      (_final: _prev: {
        inherit (standIn.pkgs)
          cudaPackages_pascal
          llama-cpp-pascal
          pascaline
          pascaline-builtin
          pascaline-engine
          pascaline-router
          ;
      })
    ];
  };
  withNixos =
    modules:
    import (nixpkgs + "/nixos/lib/eval-config.nix") {
      inherit lib;
      system = "x86_64-linux";
      modules = [
        {
          nixpkgs.pkgs = nixpkgsWithOurs;
          documentation.enable = false;
          # The minimum that makes a system complete, unless a case sets it.
          boot.loader.grub.device = lib.mkOverride 1400 "/dev/sda";
          fileSystems."/" = {
            device = lib.mkOverride 1400 "/dev/disk/by-label/root";
            fsType = lib.mkOverride 1400 "ext4";
          };
          system.stateVersion = lib.mkOverride 1400 "26.05";
        }
      ]
      ++ modules;
    };
  evaluateOnly = if real then withNixos else withStandIns;
  evaluate = modules: evaluateOnly ([ ../../modules ] ++ modules);
  failed = config: map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);

  # Only what a unit file or a target list is made of: packages become their paths.
  plain =
    value:
    if value ? outPath then
      builtins.unsafeDiscardStringContext "${value}"
    else if lib.isAttrs value then
      lib.mapAttrs (_: plain) value
    else if lib.isList value then
      map plain value
    else
      value;
  # NixOS has services of its own, and more to say of each.
  ourServices =
    services:
    lib.mapAttrs (
      _: service:
      plain {
        inherit (service)
          after
          description
          documentation
          environment
          preStart
          requires
          script
          serviceConfig
          unitConfig
          wantedBy
          wants
          ;
      }
    ) (lib.filterAttrs (name: _: lib.hasPrefix "pascaline" name || name == "grafana") services);

  host =
    modules:
    let
      inherit (evaluate modules) config;
      inherit (config.boot.loader) grub;
    in
    {
      failed = failed config;
      inherit (config) warnings;
      # Every option that NixOS reads of ours, and what it asserts of them.
      toplevel = if real then config.system.build.toplevel.drvPath else null;
      services = ourServices config.systemd.services;
      firewall = {
        inherit (config.networking.firewall) allowedTCPPorts extraInputRules;
      };
      interfaces = lib.mapAttrs (_: interface: {
        inherit (interface) useDHCP;
        addresses = map (ip: "${ip.address}/${toString ip.prefixLength}") interface.ipv4.addresses;
      }) config.networking.interfaces;
      links = lib.mapAttrs (_: link: {
        inherit (link) matchConfig linkConfig;
      }) config.systemd.network.links;
      inherit (config.networking) useDHCP;
      fileSystems = lib.mapAttrs (_: system: {
        inherit (system)
          device
          fsType
          neededForBoot
          options
          ;
      }) config.fileSystems;
      grub = {
        inherit (grub)
          enable
          device
          extraConfig
          forceInstall
          ;
      };
      systemdBoot = config.boot.loader.systemd-boot.enable;
      inherit (config.boot) extraModprobeConfig kernelModules kernelParams;
      inherit (config.hardware) enableAllHardware;
      toolkit = lib.concatMap (p: map plain (p.joined or p.paths)) (
        lib.filter (p: lib.hasPrefix "cuda-toolkit" (p.name or "")) config.environment.systemPackages
      );
      inherit (config.hardware.pascaline.driver) computeCapability;
      grafana = lib.optionalAttrs config.services.grafana.enable {
        inherit (config.services.grafana.settings) server security;
        dataSources = map (source: {
          inherit (source) name;
          isDefault = source.isDefault or false;
        }) config.services.grafana.provision.datasources.settings.datasources;
      };
      nvidia = lib.optionalAttrs config.hardware.pascaline.driver.enable {
        inherit (config.hardware.nvidia)
          branch
          open
          nvidiaPersistenced
          nvidiaSettings
          ;
      };
      variables = plain config.environment.variables;
      prometheus = {
        inherit (config.services.prometheus) retentionTime;
        scrape_interval = config.services.prometheus.globalConfig.scrape_interval or null;
      };
      scrapeConfigs = map (job: {
        inherit (job) job_name;
        static_configs = map (group: {
          inherit (group) targets;
          labels = group.labels or { };
        }) job.static_configs;
      }) config.services.prometheus.scrapeConfigs;
      ruleFiles = map toString config.services.prometheus.ruleFiles;
      alertmanager = {
        inherit (config.services.prometheus.alertmanager) configuration configText extraFlags;
      };
      tmpfiles = plain config.systemd.tmpfiles.settings;
    };

  unitText = import ./unit-text.nix { inherit lib; };
  # All that a machine without NixOS needs to run the units: their text, who wants them, what they execute and read.
  rendered =
    module:
    let
      # Always with the stand-ins: the text of NixOS' own units needs NixOS' packages.
      inherit
        (withStandIns [
          ../../modules
          module
        ])
        config
        ;
      units = lib.mapAttrs unitText (lib.mapAttrs (_: plain) config.systemd.services);
    in
    {
      failed = failed config;
      units = lib.mapAttrs' (name: unit: lib.nameValuePair "${name}.service" unit.text) units;
      wantedBy = lib.mapAttrs' (
        name: service: lib.nameValuePair "${name}.service" service.wantedBy
      ) config.systemd.services;
      files =
        lib.concatMapAttrs (_: unit: unit.files) units
        // lib.mapAttrs' (name: file: lib.nameValuePair "/etc/${name}" file.text) config.environment.etc;
      settings = lib.mapAttrs' (
        _: instance: lib.nameValuePair "${instance.configFile}" instance.finalSettings
      ) config.services.pascaline.instances;
      tmpfiles = config.systemd.tmpfiles.settings;
    };

  cases = import ./cases.nix { inherit lib; };

  # What the reference page says of each of our options (support/options.py).
  textOf = value: value.text or (lib.generators.toPretty { } value);
  optionDocs =
    options:
    lib.concatMap (
      option:
      lib.optional
        (lib.hasPrefix "services.pascaline" option.name || lib.hasPrefix "hardware.pascaline" option.name)
        (
          {
            inherit (option)
              name
              internal
              type
              readOnly
              ;
            description = option.description.text or option.description or null;
          }
          // lib.optionalAttrs (option ? default) { default = textOf option.default; }
          // lib.optionalAttrs (option ? example) { example = textOf option.example; }
        )
    ) (lib.optionAttrSetToDocList options);
  # NixOS reads the units before the assertions: a mistake must not break them before it is named.
  failedWithUnits =
    evaluated:
    builtins.deepSeq (ourServices evaluated.config.systemd.services) (failed evaluated.config);
in
{
  hosts = lib.mapAttrs (
    name: _:
    host [
      ../../hosts/common.nix
      (fleetLib.moduleOf fleet name)
    ]
  ) fleet.hosts;
  units = lib.mapAttrs (_: module: host [ module ]) cases.working;
  failures = lib.mapAttrs (_: case: {
    inherit (case) message;
    failed = failedWithUnits (evaluate [ case.module ]);
  }) cases.failing;
  # Each module as the only one of ours: what it needs of the others it brings.
  alone = lib.mapAttrs (
    name: module:
    failedWithUnits (evaluateOnly [
      (../../modules + "/${name}")
      module
    ])
  ) cases.alone;
  typeErrors = lib.mapAttrs (
    _: module:
    let
      inherit (evaluate [ module ]) config;
    in
    [
      (failed config)
      config.boot.loader.grub.device
      (ourServices config.systemd.services)
    ]
  ) cases.typeErrors;
  options = optionDocs (withStandIns [ ../../modules ]).options;
  container = rendered ../systemd/host.nix;
  # The machines of every virtual machine check.
  virtualMachines =
    let
      checks = import ./vm.nix {
        pkgs = lib.recursiveUpdate standIn.pkgs {
          inherit lib;
          testers.runNixOSTest = lib.id;
        };
      };
      machine =
        node:
        rendered {
          imports = [
            node
            ./monitoring-units.nix
          ];
        };
    in
    lib.mapAttrs (_: check: lib.mapAttrs (_: machine) check.nodes) checks;
  # What the build of a settings file runs.
  settingsCheck =
    (withStandIns [
      ../../modules
      cases.working.cpu
    ]).config.services.pascaline.instances.tiny.configFile.script;
  # Settings of every instance that any test evaluates, by what declares it.
  settings =
    lib.mapAttrs (host: _: (rendered (fleetLib.moduleOf fleet host)).settings) fleet.hosts
    // lib.mapAttrs (_: module: (rendered module).settings) cases.working;
  targets = fleetLib.targets fleet;
  # What a host does not serve with is not built for it.
  lazy =
    let
      without = missing: withoutPackages ([ "cudaPackages_pascal" ] ++ missing);
    in
    {
      sglang = without [ "llama-cpp-pascal" "pascaline-router" ] cases.working.p4;
      llamaCpp = without [ "pascaline-engine" "pascaline-router" ] cases.working.llamaCpp;
      exporter = without [
        "llama-cpp-pascal"
        "pascaline-engine"
        "pascaline-router"
      ] cases.working.exporter;
      router = without [ "llama-cpp-pascal" "pascaline-engine" ] cases.working.router;
      monitoring = without [
        "llama-cpp-pascal"
        "pascaline"
        "pascaline-engine"
        "pascaline-router"
      ] cases.working.monitoring;
    };
  # NixOS' own units of what the systemd tests run.
  nixosUnits =
    let
      inherit ((evaluate [ ../systemd/host.nix ]).config.systemd) units;
    in
    lib.mapAttrs (_: unit: builtins.unsafeDiscardStringContext unit.text) (
      lib.filterAttrs (name: _: lib.hasPrefix "pascaline" name && lib.hasSuffix ".service" name) units
    );
  # NixOS' modules behind the stand-ins: file -> options. "missing" is one that the stand-ins made up.
  nixosModules =
    let
      inherit (withNixos [ ]) options;
      paths = map (option: option.loc) (
        lib.collect lib.isOption (removeAttrs (withStandIns [ ]).options [ "_module" ])
      );
      fileOf =
        path:
        let
          files = (lib.attrByPath path { } options).declarations or [ ];
        in
        if files == [ ] then
          "missing"
        else
          lib.removePrefix "${toString nixpkgs}/" (toString (lib.head files));
    in
    lib.mapAttrs (_: map lib.showOption) (lib.groupBy fileOf paths);
  # What `nix flake init` leaves, without its wiring.
  templates =
    let
      inventory = import ../../templates/fleet/fleet.nix;
    in
    {
      box = host [
        ../../templates/single/configuration.nix
        ../../templates/single/hardware-configuration.nix
      ];
    }
    // lib.mapAttrs (
      name: _:
      host [
        ../../templates/fleet/common.nix
        (fleetLib.moduleOf inventory name)
      ]
    ) inventory.hosts;
  # A file beside ours, with the modules of other projects that it needs.
  besideOf = host (besides.modules ++ [ besides.file ]);
  oneHost = (evaluate [ cases.working.p4 ]).config.system.build.toplevel.drvPath;
  # The packages that a host allows, and licence -> whether a package of it may be part of CUDA.
  unfree =
    let
      inherit (import ../../python/unfree.nix { inherit lib; }) host cuda;
    in
    {
      packages = host.allowUnfreePackages;
      licences = lib.genAttrs [ "CUDA EULA" "cuDNN EULA" "unfree" ] (
        shortName: cuda.allowUnfreePredicate { meta.license = { inherit shortName; }; }
      );
    };
  open = host [ (fleetLib.moduleOf cases.openFleet "only") ];
  small = host [ (fleetLib.moduleOf cases.smallFleet "only") ];
  # The inventory with one more line.
  grown =
    let
      larger = lib.recursiveUpdate fleet {
        hosts.gpu-3 = fleet.hosts.gpu-1 // {
          address = "10.10.1.3";
        };
      };
    in
    {
      targets = fleetLib.targets larger;
      host = host [ (fleetLib.moduleOf larger "gpu-3") ];
      watch = host [ (fleetLib.moduleOf larger "watch") ];
    };
  problems = lib.mapAttrs (_: case: fleetLib.problems case) cases.badFleets;
}
