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
        kernelModules = strings;
        kernelParams = strings;
        loader.grub = {
          enable = bool;
          device = option types.str "";
          forceInstall = bool;
          extraConfig = lines;
        };
        loader.systemd-boot.enable = bool;
      };
      environment = {
        etc = option (types.attrsOf (types.submodule { options.text = lines; })) { };
        systemPackages = option (types.listOf types.package) [ ];
        variables = option (types.attrsOf types.str) { };
      };
      fileSystems = anything;
      hardware = {
        enableAllHardware = bool;
        cpu.intel.updateMicrocode = bool;
        graphics.enable = bool;
        nvidia = {
          branch = option types.str "stable";
          # As in 26.05: the branch decides the package; versions as nixpkgs had them in August 2026.
          package = mkOption { type = types.package; };
          open = option (types.nullOr types.bool) null;
          nvidiaSettings = option types.bool true;
          nvidiaPersistenced = bool;
          videoAcceleration = option types.bool true;
        };
      };
      networking = {
        hostName = option types.str "";
        hosts = option (types.attrsOf (types.listOf types.str)) { };
        useDHCP = option types.bool true;
        interfaces = anything;
        nftables.enable = bool;
        firewall = {
          enable = option types.bool true;
          allowedTCPPorts = option (types.listOf types.port) [ ];
          extraInputRules = lines;
        };
      };
      nixpkgs = {
        config = anything;
        overlays = option (types.listOf types.unspecified) [ ];
      };
      services = {
        # As in 26.05, which has no secret of its own.
        grafana = {
          enable = bool;
          dataDir = option types.path "/var/lib/grafana";
          provision = anything;
          settings = mkOption {
            type = types.submodule {
              freeformType = types.attrsOf types.anything;
              options.security.secret_key = mkOption { type = types.str; };
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
          globalConfig = anything;
          ruleFiles = option (types.listOf types.path) [ ];
          scrapeConfigs = option (types.listOf types.anything) [ ];
          alertmanagers = option (types.listOf types.anything) [ ];
          alertmanager = {
            enable = bool;
            port = option types.port 9093;
            listenAddress = option types.str "";
            configuration = option (types.nullOr types.attrs) null;
            extraFlags = strings;
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

  # Driver packages by branch, for `hardware.nvidia.package`.
  driverModule =
    { config, ... }:
    {
      hardware.nvidia.package = lib.mkDefault (
        package "nvidia-x11" {
          version =
            {
              legacy_470 = "470.256.02";
              legacy_535 = "535.288.01";
              legacy_580 = "580.173.02";
              dc_580 = "580.159.04";
            }
            .${config.hardware.nvidia.branch} or "595.84";
        }
      );
    };
}
