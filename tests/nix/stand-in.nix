# Stand-ins for the NixOS options that our modules touch, with NixOS' types, and for the packages that they name.
# They serve where nixpkgs itself cannot be had; with a real nixpkgs the same cases run against the real modules (checks.nix).
{ lib }:
let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  anything = option types.anything { };
  bool = option types.bool false;
  strings = option (types.listOf types.str) [ ];
  lines = option types.lines "";

  unitOption = types.oneOf [
    types.bool
    types.int
    types.float
    types.str
    types.path
    (types.listOf (
      types.oneOf [
        types.bool
        types.int
        types.str
        types.path
      ]
    ))
  ];
  service = types.submodule {
    options = {
      enable = option types.bool true;
      description = option types.str "";
      documentation = strings;
      wantedBy = strings;
      wants = strings;
      requires = strings;
      after = strings;
      path = option (types.listOf types.anything) [ ];
      startLimitIntervalSec = option (types.nullOr types.int) null;
      startLimitBurst = option (types.nullOr types.int) null;
      environment = option (types.attrsOf (
        types.nullOr (
          types.oneOf [
            types.str
            types.path
            types.package
          ]
        )
      )) { };
      unitConfig = option (types.attrsOf unitOption) { };
      serviceConfig = option (types.attrsOf unitOption) { };
      script = lines;
      preStart = lines;
    };
  };

  freeform = types.submodule { freeformType = types.attrsOf types.anything; };
  # A file system without a type is refused, as in 26.05.
  fileSystem = types.submodule {
    options = {
      device = option (types.nullOr types.str) null;
      fsType = mkOption { type = types.str; };
      neededForBoot = bool;
      options = option (types.nonEmptyListOf types.str) [ "defaults" ];
    };
  };
  interface = types.submodule {
    options = {
      useDHCP = option (types.nullOr types.bool) null;
      ipv4.addresses = option (types.listOf (
        types.submodule {
          options = {
            address = mkOption { type = types.str; };
            prefixLength = mkOption { type = types.ints.between 0 32; };
          };
        }
      )) [ ];
    };
  };
  # As nixpkgs had them in the middle of 2026.
  driverVersions = {
    beta = "595.45.04";
    dc_580 = "580.159.04";
    legacy_340 = "340.108";
    legacy_390 = "390.157";
    legacy_470 = "470.256.02";
    legacy_535 = "535.288.01";
    legacy_580 = "580.173.02";
    stable = "595.84";
    vulkan_beta = "595.44.09";
  };
  nvidiaEnabled = config: lib.elem "nvidia" config.services.xserver.videoDrivers;

  # What a package is to a module: a store path with a name.
  package =
    name: extra:
    {
      type = "derivation";
      inherit name;
      pname = name;
      outPath = "/nix/store/00000000000000000000000000000000-${name}";
      outputName = "out";
      outputs = [ "out" ];
      out = package name extra;
      meta.mainProgram = name;
    }
    // extra;
  # As nixpkgs splits CUDA's components.
  outputs =
    name:
    lib.genAttrs [ "dev" "lib" "static" ] (output: package "${name}-${output}" { })
    // {
      outputs = [
        "out"
        "dev"
        "lib"
        "static"
      ];
    };
  text = name: content: builtins.unsafeDiscardStringContext (builtins.toFile name content);
in
{
  inherit driverVersions;

  pkgs = {
    pascaline = package "pascaline" { };
    pascaline-builtin = package "pascaline-builtin" { meta.mainProgram = "pascaline"; };
    pascaline-engine = package "pascaline-engine" { };
    pascaline-router = package "pascaline-router" { };
    llama-cpp-pascal = package "llama-cpp" { meta.mainProgram = "llama-server"; };
    coreutils = package "coreutils" { };
    stdenv.cc = package "gcc" { };
    curl = package "curl" { };
    prometheus = package "prometheus" { };
    prometheus-alertmanager = package "prometheus-alertmanager" { meta.mainProgram = "alertmanager"; };
    cudaPackages_pascal = lib.genAttrs [
      "cuda_cccl"
      "cuda_cudart"
      "cuda_nvcc"
      "cuda_nvprof"
      "cuda_nvrtc"
      "cudnn"
      "libcublas"
      "nccl"
    ] (name: package name (outputs name));
    symlinkJoin =
      { name, paths }:
      package name { joined = map (path: "${path}") paths; };
    linkFarm = name: _entries: package name { };
    runCommand =
      name: _attrs: script:
      package name { inherit script; };
    runCommandCC =
      name: _attrs: _script:
      package name { };
    writeShellScriptBin = name: _text: package name { };
    writeShellApplication = { name, text, ... }: package name { passthru = { inherit text; }; };
    # JSON where nixpkgs writes TOML: the tests turn it into TOML before they check it.
    formats.toml = _: {
      type = types.attrsOf types.anything;
      generate = name: value: package name { outPath = text name (builtins.toJSON value); };
    };
  };

  module = {
    options = {
      assertions = option (types.listOf types.unspecified) [ ];
      warnings = strings;
      boot = {
        extraModprobeConfig = lines;
        initrd = {
          availableKernelModules = strings;
          kernelModules = strings;
          luks.devices = anything;
        };
        kernelModules = strings;
        kernelParams = strings;
        loader.efi.canTouchEfiVariables = bool;
        loader.grub = {
          enable = option types.bool true;
          device = option types.str "";
          devices = strings;
          forceInstall = bool;
          extraConfig = lines;
        };
        loader.systemd-boot.enable = bool;
        supportedFilesystems = strings;
      };
      environment = {
        etc = option (types.attrsOf (types.submodule { options.text = lines; })) { };
        systemPackages = option (types.listOf types.package) [ ];
        variables = option (types.attrsOf types.str) { };
      };
      fileSystems = option (types.attrsOf fileSystem) { };
      swapDevices = option (types.listOf types.anything) [ ];
      hardware = {
        enableAllHardware = bool;
        cpu.intel.updateMicrocode = bool;
        graphics.enable = bool;
        nvidia = {
          branch = option (types.enum (lib.attrNames driverVersions)) "stable";
          # As in 26.05: the branch decides the package.
          package = mkOption { type = types.package; };
          open = option (types.nullOr types.bool) null;
          nvidiaSettings = option types.bool true;
          nvidiaPersistenced = bool;
          videoAcceleration = option types.bool true;
        };
      };
      networking = {
        hostId = option (types.nullOr types.str) null;
        hostName = option types.str "";
        hosts = option (types.attrsOf (types.listOf types.str)) { };
        useDHCP = option types.bool true;
        interfaces = option (types.attrsOf interface) { };
        nftables.enable = bool;
        firewall = {
          enable = option types.bool true;
          allowedTCPPorts = option (types.listOf types.port) [ ];
          extraInputRules = lines;
        };
      };
      nixpkgs = {
        config = anything;
        hostPlatform = option types.str "x86_64-linux";
        overlays = option (types.listOf types.unspecified) [ ];
      };
      services = {
        grafana = {
          enable = bool;
          dataDir = option types.path "/var/lib/grafana";
          openFirewall = bool;
          provision = {
            enable = bool;
            datasources.settings.datasources = option (types.listOf freeform) [ ];
            dashboards.settings.providers = option (types.listOf freeform) [ ];
          };
          settings = mkOption {
            type = types.submodule {
              freeformType = types.attrsOf types.anything;
              options = {
                server.http_addr = option types.str "127.0.0.1";
                server.http_port = option types.port 3000;
                security.admin_password = option types.str "admin";
                security.secret_key = option (types.nullOr types.str) null;
              };
            };
            default = { };
          };
        };
        openssh.enable = bool;
        prometheus = {
          enable = bool;
          port = option types.port 9090;
          listenAddress = option types.str "0.0.0.0";
          retentionTime = option (types.nullOr types.str) null;
          globalConfig = option freeform { };
          ruleFiles = option (types.listOf types.path) [ ];
          scrapeConfigs = option (types.listOf types.anything) [ ];
          alertmanagers = option (types.listOf types.anything) [ ];
          alertmanager = {
            enable = bool;
            port = option types.port 9093;
            listenAddress = option types.str "";
            clusterPeers = strings;
            configText = option (types.nullOr types.lines) null;
            # Of several definitions the last one's keys win, without a word.
            configuration = option (types.nullOr types.attrs) null;
            extraFlags = strings;
            openFirewall = bool;
          };
        };
        xserver.videoDrivers = strings;
      };
      system = {
        activationScripts = anything;
        stateVersion = option types.str "";
      };
      systemd = {
        services = option (types.attrsOf service) { };
        network.links = option (types.attrsOf (
          types.submodule {
            options = {
              matchConfig = option (types.attrsOf unitOption) { };
              linkConfig = option (types.attrsOf unitOption) { };
            };
          }
        )) { };
        paths = anything;
        slices = anything;
        tmpfiles.settings = option (types.attrsOf types.anything) { };
      };
      virtualisation.memorySize = option types.int 1024;
      users = {
        users = option (types.attrsOf (
          types.submodule {
            freeformType = types.attrsOf types.anything;
            options.group = option types.str "";
          }
        )) { };
        groups = anything;
      };
    };

  };

  # What NixOS' modules make of these options, where ours rely on it.
  nixosModule =
    { config, ... }:
    let
      inherit (config.services) grafana openssh prometheus;
    in
    {
      assertions = [
        {
          assertion =
            prometheus.alertmanager.enable
            -> prometheus.alertmanager.configuration != null || prometheus.alertmanager.configText != null;
          message = "Can not enable alertmanager without a configuration. Set either the `configuration` or `configText` attribute.";
        }
        {
          # As in 26.05, which has no secret of its own.
          assertion = grafana.enable -> grafana.settings.security.secret_key != null;
          message = "Grafana's secret key (services.grafana.settings.security.secret_key) doesn't have a default value anymore.";
        }
        {
          assertion = config.hardware.nvidia.open != null || !nvidiaEnabled config;
          message = "You must configure `hardware.nvidia.open` on NVIDIA driver versions >= 560.";
        }
      ];
      # The driver loads where udev finds a card; CUDA's module follows it, and is loaded at boot only with the open driver.
      boot.extraModprobeConfig = lib.mkIf (nvidiaEnabled config) "softdep nvidia post: nvidia-uvm\n";
      boot.kernelModules = lib.mkIf (nvidiaEnabled config && config.hardware.nvidia.open == true) [
        "nvidia_uvm"
      ];
      boot.loader.grub.enable = lib.mkIf config.boot.loader.systemd-boot.enable (lib.mkDefault false);
      hardware.nvidia.package = lib.mkDefault (
        package "nvidia-x11" { version = driverVersions.${config.hardware.nvidia.branch}; }
      );
      networking.firewall.allowedTCPPorts =
        lib.optional openssh.enable 22
        ++ lib.optional (grafana.enable && grafana.openFirewall) grafana.settings.server.http_port
        ++ lib.optional (
          prometheus.alertmanager.enable && prometheus.alertmanager.openFirewall
        ) prometheus.alertmanager.port;
    };
}
