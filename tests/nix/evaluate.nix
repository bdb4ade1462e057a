# Evaluates our modules with nixpkgs' lib and the stand-ins: { libPath } -> what the tests ask for, as plain data.
{ libPath }:
let
  lib = import libPath;
  standIn = import ./stand-in.nix { inherit lib; };
  fleetLib = import ../../hosts { inherit lib; };
  fleet = import ../../hosts/fleet.nix;

  evaluate =
    modules:
    lib.evalModules {
      modules = [
        standIn.module
        standIn.driverModule
        ../../modules
      ]
      ++ modules;
      specialArgs = { inherit (standIn) pkgs; };
    };
  failed = config: map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);

  # Only what a unit file or a target list is made of: packages become their paths.
  plain =
    value:
    if value ? outPath then
      "${value}"
    else if lib.isAttrs value then
      lib.mapAttrs (_: plain) value
    else if lib.isList value then
      map plain value
    else
      value;

  host =
    modules:
    let
      inherit (evaluate modules) config;
    in
    {
      failed = failed config;
      services = lib.mapAttrs (
        _: s:
        plain (
          removeAttrs s [
            "_module"
            "path"
          ]
        )
      ) config.systemd.services;
      firewall = removeAttrs config.networking.firewall [ "enable" ];
      inherit (config.networking) interfaces useDHCP;
      fileSystems = plain config.fileSystems;
      grub = config.boot.loader.grub;
      inherit (config.boot) kernelModules kernelParams;
      inherit (config.hardware) enableAllHardware;
      packages = map (p: p.joined or [ "${p}" ]) config.environment.systemPackages;
      inherit (config.hardware.pascaline.driver) computeCapability;
      grafana = lib.optionalAttrs config.services.grafana.enable config.services.grafana.settings;
      nvidia = {
        inherit (config.hardware.nvidia) branch open nvidiaPersistenced;
      };
      variables = config.environment.variables;
      scrapeConfigs = config.services.prometheus.scrapeConfigs;
      ruleFiles = map toString config.services.prometheus.ruleFiles;
      alertmanager = {
        inherit (config.services.prometheus.alertmanager) configuration extraFlags;
      };
      tmpfiles = config.systemd.tmpfiles.settings;
    };

  unitText = import ./unit-text.nix { inherit lib; };
  # All that a machine without NixOS needs to run the units: their text, who wants them, what they execute and read.
  rendered =
    module:
    let
      inherit (evaluate [ module ]) config;
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
in
{
  hosts = lib.mapAttrs (name: _: host [ (fleetLib.moduleOf fleet name) ]) fleet.hosts;
  units = lib.mapAttrs (_: host) (lib.mapAttrs (_: module: [ module ]) cases.working);
  # NixOS reads the units before the assertions: a mistake must not break them before it is named.
  failures = lib.mapAttrs (
    _: case:
    let
      inherit (evaluate [ case.module ]) config;
    in
    {
      inherit (case) message;
      failed = builtins.deepSeq (lib.mapAttrs (_: plain) config.systemd.services) (failed config);
    }
  ) cases.failing;
  # Each module as the only one of ours: what it needs of the others it brings.
  alone = lib.mapAttrs (
    name: module:
    let
      inherit
        (lib.evalModules {
          modules = [
            standIn.module
            standIn.driverModule
            (../../modules + "/${name}")
            module
          ];
          specialArgs = { inherit (standIn) pkgs; };
        })
        config
        ;
    in
    builtins.deepSeq (lib.mapAttrs (_: plain) config.systemd.services) (failed config)
  ) cases.alone;
  typeErrors = lib.mapAttrs (
    _: module:
    let
      inherit (evaluate [ module ]) config;
    in
    [
      config.assertions
      config.boot.loader.grub.device
      (lib.mapAttrs (_: service: service.serviceConfig) config.systemd.services)
    ]
  ) cases.typeErrors;
  options = optionDocs (evaluate [ ]).options;
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
    (evaluate [ cases.working.cpu ]).config.services.pascaline.instances.tiny.configFile.script;
  # Settings of every instance that any test evaluates, by what declares it.
  settings =
    lib.mapAttrs (host: _: (rendered (fleetLib.moduleOf fleet host)).settings) fleet.hosts
    // lib.mapAttrs (_: module: (rendered module).settings) cases.working;
  targets = fleetLib.targets fleet;
  # The driver's packages that a host allows, and licence -> whether a package of it may be part of CUDA.
  unfree =
    let
      inherit (import ../../python/unfree.nix { inherit lib; }) driver cuda;
    in
    {
      packages = driver.allowUnfreePackages;
      licences = lib.genAttrs [ "CUDA EULA" "cuDNN EULA" "unfree" ] (
        shortName: cuda.allowUnfreePredicate { meta.license = { inherit shortName; }; }
      );
    };
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
