# Configurations that must evaluate, that must fail with a given message, and that the option types must refuse.
{
  lib,
  # Versions of the driver's branches.
  versions ? {
    beta = "595.45.04";
    legacy_340 = "340.108";
    legacy_390 = "390.157";
    legacy_470 = "470.256.02";
    stable = "595.84";
    vulkan_beta = "595.44.09";
  },
}:
let
  digest = lib.concatStrings (lib.genList (_: "ab") 32);
  driver.hardware.pascaline.driver.enable = true;
  instance = name: settings: { services.pascaline.instances.${name} = settings; };
  on = module: { imports = [ driver ] ++ lib.toList module; };
  builtinModel.settings.model = "builtin:smollm2-135m";
  # A hardware-configuration.nix as nixos-generate-config writes one, on a CloudLab node.
  generated = module: {
    imports = [ module ];
    hardware.pascaline.cloudlab.enable = true;
    boot.initrd.availableKernelModules = [
      "ahci"
      "xhci_pci"
      "sd_mod"
    ];
    fileSystems."/" = {
      device = "/dev/disk/by-uuid/0b1f7c5e-5bfa-4d7b-9a2c-0e1b7f3f5a10";
      fsType = "ext4";
    };
    swapDevices = [ { device = "/dev/disk/by-uuid/c1b7cb8b-7d41-4d27-9f0b-1f2b3c4d5e6f"; } ];
    networking.useDHCP = lib.mkDefault true;
    hardware.cpu.intel.updateMicrocode = lib.mkDefault true;
  };
  monitored =
    settings:
    lib.recursiveUpdate {
      pascaline.monitoring = {
        enable = true;
        alertmanager.webhookUrl = "http://127.0.0.1:9099/";
      };
    } settings;
  # The least that a host of an inventory says.
  dhcp = {
    address = "10.0.0.1";
    network = "dhcp";
  };
  # A driver's branch that a Pascal host must not have.
  branch = name: on { hardware.pascaline.driver.branch = name; };
  tooNew =
    version: name:
    "hardware.pascaline.driver.branch: driver ${version} of branch '${name}' ignores Pascal, must be R580 or older; set hardware.pascaline.driver.branch = \"legacy_580\" and do not set hardware.nvidia.package";
  tooOld =
    version: name:
    "hardware.pascaline.driver.branch: driver ${version} of branch '${name}' is too old for torch's CUDA 12, must be R525 or newer; set hardware.pascaline.driver.branch = \"legacy_580\" and do not set hardware.nvidia.package";
in
rec {
  working = {
    cpu = instance "tiny" (
      builtinModel
      // {
        gpus = [ ];
        memoryMax = "8G";
      }
    );
    p4 = on [
      (instance "emily" {
        model = "emily";
        apiKeyFile = "/run/secrets/key";
        openFirewall = true;
        settings = {
          host = "0.0.0.0";
          card = "tesla-p4";
          kv_cache.dtype = "int8";
        };
      })
      {
        services.pascaline.models.emily = {
          path = "/data/emily.gguf";
          sha256 = digest;
        };
      }
    ];
    shared = on [
      (instance "a" (lib.recursiveUpdate builtinModel { settings.mem_fraction_static = 0.45; }))
      (instance "b" (
        lib.recursiveUpdate builtinModel {
          settings = {
            mem_fraction_static = 0.45;
            port = 30010;
            agent_port = 30011;
          };
        }
      ))
    ];
    llamaCpp = on (
      instance "second" (lib.recursiveUpdate builtinModel { settings.engine = "llama.cpp"; })
    );
    # A mixture with experts in the host's memory beside its card, and a second instance on the other socket.
    sockets = on [
      (instance "card" (
        lib.recursiveUpdate builtinModel {
          numaNode = 0;
          memoryMax = "40G";
          settings = {
            engine = "llama.cpp";
            placement.experts = "auto";
          };
        }
      ))
      (instance "host" (
        lib.recursiveUpdate builtinModel {
          gpus = [ ];
          numaNode = [
            2
            3
          ];
          settings = {
            engine = "llama.cpp";
            device = "cpu";
            port = 30010;
            agent_port = 30011;
          };
        }
      ))
    ];
    # The same limits by a file that the program wrote; one of them is overridden.
    plannedLimits = on [
      (instance "card" (lib.recursiveUpdate builtinModel { limits = ./limits/emily.json; }))
      (instance "host" (
        lib.recursiveUpdate builtinModel {
          gpus = [ ];
          limits = ./limits/emily.json;
          numaNode = 1;
          settings = {
            device = "cpu";
            port = 30010;
            agent_port = 30011;
          };
        }
      ))
    ];
    exporter = on {
      services.pascaline.exporter = {
        enable = true;
        host = "0.0.0.0";
        openFirewall = true;
      };
    };
    monitoring.services = {
      pascaline.monitoring = {
        enable = true;
        alertmanager.webhookUrl = "http://127.0.0.1:9099/";
        grafana.host = "0.0.0.0";
        grafana.openFirewall = true;
        openFirewall = true;
      };
      grafana.settings.security.admin_password = "$__file{/etc/pascaline/grafana-password}";
      prometheus.listenAddress = "0.0.0.0";
    };
    # Beside a Prometheus, a Grafana and an Alertmanager that the host has already.
    ownPrometheus.services = {
      pascaline.monitoring = {
        enable = true;
        alertmanager.webhookUrl = "http://127.0.0.1:9099/";
        exporters = [
          {
            instance = "gpu-1";
            address = "10.0.0.1:9836";
          }
        ];
      };
      prometheus = {
        enable = true;
        retentionTime = "1y";
        globalConfig.scrape_interval = "1m";
        scrapeConfigs = [
          {
            job_name = "node";
            static_configs = [ { targets = [ "127.0.0.1:9100" ]; } ];
          }
        ];
      };
    };
    ownGrafana.services = {
      pascaline.monitoring = {
        enable = true;
        alertmanager.enable = false;
      };
      grafana = {
        enable = true;
        settings = {
          server.http_port = 3001;
          security.secret_key = "$__file{/run/secrets/grafana}";
        };
        provision.datasources.settings.datasources = [
          {
            name = "Prometheus";
            type = "prometheus";
            url = "http://10.0.0.9:9090";
            isDefault = true;
          }
        ];
      };
    };
    ownAlertmanager.services = {
      pascaline.monitoring.enable = true;
      prometheus.alertmanager = {
        enable = true;
        configuration = {
          route.receiver = "mine";
          receivers = [ { name = "mine"; } ];
        };
        extraFlags = [ "--data.retention=120h" ];
      };
    };
    alertmanagerAsText.services = {
      pascaline.monitoring.enable = true;
      prometheus.alertmanager.configText = "route: {receiver: mine}\nreceivers: [{name: mine}]\n";
    };
    # A cluster of Alertmanagers keeps its own address.
    alertmanagerCluster.services = {
      pascaline.monitoring = {
        enable = true;
        alertmanager.webhookUrl = "http://127.0.0.1:9099/";
      };
      prometheus.alertmanager.clusterPeers = [ "10.0.0.2" ];
    };
    ownUser = {
      services.pascaline = {
        user = "inference";
        exporter.enable = true;
      };
      users.groups.inference = { };
      users.users.inference = {
        isSystemUser = true;
        group = "inference";
      };
    };
    # A PC whose owner had set up the card already.
    desktop = on {
      services.xserver.videoDrivers = [ "nvidia" ];
      hardware.nvidia = {
        nvidiaSettings = true;
        nvidiaPersistenced = true;
        open = false;
      };
    };
    limits = on {
      hardware.pascaline.driver = {
        powerLimitWatts = 60;
        applicationClocks = {
          memory = 3003;
          graphics = 1531;
        };
      };
    };
    cuda.hardware.pascaline.cuda.enable = true;
    cudaDebug.hardware.pascaline.cuda = {
      enable = true;
      debug = true;
    };
    # Neither the query nor the blank of a link is lost on the way to the unit.
    download.services.pascaline.models.emily = {
      url = "https://models.example.org/my%20emily.gguf?download=true";
      sha256 = digest;
    };
    # Of a split model each part has a checksum, for the unit that brings it and for the instance.
    split = on [
      (instance "emily" {
        model = "emily";
        gpus = [ ];
      })
      {
        services.pascaline.models.emily = {
          url = "https://models.example.org/emily-00001-of-00002.gguf";
          sha256 = [
            digest
            (lib.toUpper digest)
          ];
        };
      }
    ];
    garbage.services.pascaline = {
      collectModelGarbage = true;
      models.emily = {
        url = "https://models.example.org/emily.gguf";
        sha256 = digest;
      };
    };
    router.services.pascaline.router = {
      enable = true;
      workers = [ "http://127.0.0.1:30000" ];
      apiKeyFile = "/run/secrets/key";
      host = "0.0.0.0";
      openFirewall = true;
    };
    # An interface by name keeps it; by MAC address or driver it is given one.
    addressByName.hardware.pascaline.network = {
      address = "10.10.1.1";
      name = "enp94s0f0";
    };
    addressByMac.hardware.pascaline.network = {
      address = "10.10.1.1";
      prefixLength = 16;
      mac = "3C:FD:FE:00:00:01";
    };
    addressByDriver.hardware.pascaline.network = {
      address = "10.10.1.1";
      driver = "ixgbe";
    };
    # CloudLab's profile over what nixos-generate-config and the installer wrote.
    generated = generated {
      boot.loader.grub.enable = true;
      boot.loader.grub.device = "/dev/sda";
    };
    generatedSystemdBoot = generated {
      boot.loader.systemd-boot.enable = true;
      boot.loader.efi.canTouchEfiVariables = true;
      fileSystems."/boot" = {
        device = "/dev/disk/by-uuid/6F32-0E1C";
        fsType = "vfat";
        options = [ "fmask=0022" ];
      };
    };
    lvmRoot = generated {
      hardware.pascaline.cloudlab.controlInterface = "eno1";
      boot.initrd.kernelModules = [ "dm-snapshot" ];
      fileSystems."/".device = lib.mkForce "/dev/vg/root";
    };
    zfsRoot = generated {
      boot.supportedFilesystems = [ "zfs" ];
      networking.hostId = "8425e349";
      fileSystems."/" = {
        device = lib.mkForce "rpool/root";
        fsType = lib.mkForce "zfs";
      };
    };
    cloudlab.hardware.pascaline.cloudlab = {
      enable = true;
      dataDevice = "/dev/disk/by-label/data";
      nixDevice = "/dev/disk/by-label/nix";
      controlInterface = "eno1";
    };
  };

  # One for each file of modules/ that the flake exposes.
  alone = {
    "cloudlab.nix" = working.cloudlab;
    "cuda.nix" = working.cuda;
    "driver.nix" = driver;
    "exporter.nix".services.pascaline.exporter.enable = true;
    "inference.nix" = instance "tiny" builtinModel;
    "models.nix" = working.download;
    inherit (working) monitoring;
    "network.nix" = working.addressByMac;
    "router.nix" = working.router;
  };

  failing = {
    newDriver = {
      module = branch "stable";
      message = tooNew versions.stable "stable";
    };
    betaDriver = {
      module = branch "beta";
      message = tooNew versions.beta "beta";
    };
    vulkanDriver = {
      module = branch "vulkan_beta";
      message = tooNew versions.vulkan_beta "vulkan_beta";
    };
    keplerDriver = {
      module = branch "legacy_470";
      message = tooOld versions.legacy_470 "legacy_470";
    };
    fermiDriver = {
      module = branch "legacy_390";
      message = tooOld versions.legacy_390 "legacy_390";
    };
    teslaDriver = {
      module = branch "legacy_340";
      message = tooOld versions.legacy_340 "legacy_340";
    };
    oldCard = {
      module = on { hardware.pascaline.driver.computeCapability = "5.2"; };
      message = "hardware.pascaline.driver.computeCapability: 5.2 is older than Pascal, must be 6.0 (Tesla P100) or 6.1 (Tesla P4, P40, GTX 10xx); cards below 6.0 are not supported";
    };
    newCard = {
      module = on { hardware.pascaline.driver.computeCapability = "7.5"; };
      message = "hardware.pascaline.driver.computeCapability: 7.5 is newer than Pascal's cards for servers and desktops, must be 6.0 or 6.1; newer cards are served by upstream SGLang with the default driver";
    };
    # A Jetson is Pascal too, but has another driver and none of our kernels.
    jetson = {
      module = on { hardware.pascaline.driver.computeCapability = "6.2"; };
      message = "hardware.pascaline.driver.computeCapability: 6.2 is newer than Pascal's cards for servers and desktops, must be 6.0 or 6.1; newer cards are served by upstream SGLang with the default driver";
    };
    otherVideoDriver = {
      module = on { services.xserver.videoDrivers = [ "modesetting" ]; };
      message = "services.xserver.videoDrivers: nvidia is not among modesetting, must be there for its kernel module to be installed, with or without an X server; add it";
    };
    openModule = {
      module = on { hardware.nvidia.open = true; };
      message = "hardware.nvidia.open: the open kernel module needs a GPU with GSP firmware (Turing or newer), must be false for Pascal; remove your setting";
    };
    noDriver = {
      module = instance "emily" (builtinModel // { gpus = [ 0 ]; });
      message = "services.pascaline.instances.emily.gpus: no driver is declared for GPU 0; set hardware.pascaline.driver.enable = true, or gpus = [ ] for the CPU";
    };
    twoOnOneGpu = {
      module = on [
        (instance "a" builtinModel)
        (instance "b" (
          lib.recursiveUpdate builtinModel {
            settings = {
              port = 30010;
              agent_port = 30011;
            };
          }
        ))
      ];
      # Their default shares of 0.9 each do not fit either, which is said too.
      message = "services.pascaline.instances: a and b share GPU 0, must both set settings.mem_fraction_static; give each its share (for example 0.45), or move one to another GPU";
    };
    tooMuchOnOneGpu = {
      module = on [
        (instance "a" (lib.recursiveUpdate builtinModel { settings.mem_fraction_static = 0.6; }))
        (instance "b" (
          lib.recursiveUpdate builtinModel {
            settings = {
              mem_fraction_static = 0.6;
              port = 30010;
              agent_port = 30011;
            };
          }
        ))
      ];
      message = "GPU 0: the instances on it plan 120 % of its memory together, must be at most 100 %; lower their settings.mem_fraction_static (0.9 where unset), or move one to another GPU";
    };
    portClash = {
      module = on [
        (instance "a" (builtinModel // { gpus = [ 0 ]; }))
        (instance "b" (
          lib.recursiveUpdate builtinModel {
            gpus = [ 1 ];
            settings.agent_port = 30011;
          }
        ))
      ];
      message = "port 30000 is used by services.pascaline.instances.a.settings.port and services.pascaline.instances.b.settings.port, must be used once; give one of them another port";
    };
    portClashOfServices = {
      module = {
        services.pascaline = {
          exporter.enable = true;
          router = {
            enable = true;
            workers = [ "http://10.0.0.1:30000" ];
            metricsPort = 9836;
          };
        };
      };
      message = "port 9836 is used by services.pascaline.exporter.port and services.pascaline.router.metricsPort, must be used once; give one of them another port";
    };
    portClashWithGrafana = {
      module = on [
        (instance "a" (lib.recursiveUpdate builtinModel { settings.port = 3000; }))
        {
          services.pascaline.monitoring = {
            enable = true;
            alertmanager.webhookUrl = "http://127.0.0.1:9099/";
          };
        }
      ];
      message = "port 3000 is used by services.pascaline.instances.a.settings.port and services.pascaline.monitoring.grafana.port, must be used once; give one of them another port";
    };
    openWithoutKey = {
      module = on (
        instance "emily" (
          lib.recursiveUpdate builtinModel {
            openFirewall = true;
            settings.host = "0.0.0.0";
          }
        )
      );
      message = "services.pascaline.instances.emily.openFirewall: the API would be open to everyone, must have an API key; set services.pascaline.instances.emily.apiKeyFile";
    };
    listenWithoutKey = {
      module = on (
        instance "emily" (lib.recursiveUpdate builtinModel { settings.agent_host = "10.0.0.1"; })
      );
      message = "services.pascaline.instances.emily: without an API key others could use the API or read the agent; set services.pascaline.instances.emily.apiKeyFile, or settings.allow_unauthenticated = true if the network itself admits nobody else";
    };
    openOnLoopback = {
      module = on (
        instance "emily" (
          builtinModel
          // {
            openFirewall = true;
            apiKeyFile = "/run/secrets/key";
          }
        )
      );
      message = "services.pascaline.instances.emily.openFirewall: the API listens on 127.0.0.1 only, must listen on an outer address; set services.pascaline.instances.emily.settings.host = \"0.0.0.0\"";
    };
    exporterOpenOnLoopback = {
      module.services.pascaline.exporter = {
        enable = true;
        openFirewall = true;
      };
      message = "services.pascaline.exporter.openFirewall: the exporter listens on 127.0.0.1 only, must listen on an outer address; set services.pascaline.exporter.host = \"0.0.0.0\"";
    };
    routerOpenOnLoopback = {
      module.services.pascaline.router = {
        enable = true;
        workers = [ "http://127.0.0.1:30000" ];
        apiKeyFile = "/run/secrets/key";
        openFirewall = true;
      };
      message = "services.pascaline.router.openFirewall: the router listens on 127.0.0.1 only, must listen on an outer address; set services.pascaline.router.host = \"0.0.0.0\"";
    };
    grafanaOpenOnLoopback = {
      module.services = monitored { pascaline.monitoring.grafana.openFirewall = true; };
      message = "services.pascaline.monitoring.grafana.openFirewall: Grafana listens on 127.0.0.1 only, must listen on an outer address; set services.pascaline.monitoring.grafana.host = \"0.0.0.0\"";
    };
    # By NixOS' own option, on a name that is loopback too.
    nixosGrafanaOpenOnLoopback = {
      module.services = monitored {
        pascaline.monitoring.grafana.host = "localhost";
        grafana.openFirewall = true;
      };
      message = "services.grafana.openFirewall: Grafana listens on localhost only, must listen on an outer address; set services.pascaline.monitoring.grafana.host = \"0.0.0.0\"";
    };
    grafanaWithEveryonesPassword = {
      module.services = monitored { pascaline.monitoring.grafana.host = "0.0.0.0"; };
      message = "services.grafana.settings.security.admin_password: Grafana listens on 0.0.0.0 with the password that everyone knows, must be one of your own; set it to \"$__file{/etc/pascaline/grafana-password}\", a file that only grafana can read";
    };
    prometheusOpenOnLoopback = {
      module.services = monitored { pascaline.monitoring.openFirewall = true; };
      message = "services.pascaline.monitoring.openFirewall: Prometheus listens on 127.0.0.1 only, must listen on an outer address; set services.prometheus.listenAddress = \"0.0.0.0\"";
    };
    alertmanagerOpenOnLoopback = {
      module.services = monitored { prometheus.alertmanager.openFirewall = true; };
      message = "services.prometheus.alertmanager.openFirewall: Alertmanager listens on 127.0.0.1 only, must listen on an outer address; set services.prometheus.alertmanager.listenAddress = \"0.0.0.0\"";
    };
    twoAlertConfigurations = {
      module.services = monitored {
        prometheus.alertmanager.configuration = {
          route.receiver = "mine";
          receivers = [ { name = "mine"; } ];
        };
      };
      message = "services.pascaline.monitoring.alertmanager.webhookUrl: set beside a configuration of your own in services.prometheus.alertmanager, must be one of the two; give your configuration a receiver with webhook_configs and remove webhookUrl";
    };
    clusterFlagTwice = {
      module.services = monitored {
        prometheus.alertmanager.extraFlags = [ "--cluster.listen-address=127.0.0.1:9094" ];
      };
      message = "services.prometheus.alertmanager.extraFlags: --cluster.listen-address= is there twice, must be there once; remove yours, or replace the list with lib.mkForce";
    };
    jobTwice = {
      module.services = monitored {
        pascaline.monitoring.nodes = [
          {
            instance = "gpu-1";
            address = "10.0.0.1:9100";
          }
        ];
        prometheus.scrapeConfigs = [
          {
            job_name = "node";
            static_configs = [ ];
          }
        ];
      };
      message = "services.prometheus.scrapeConfigs: job_name node is there twice, must be there once; rename your own job, or leave out its targets here";
    };
    undeclaredUser = {
      module.services.pascaline = {
        user = "inference";
        exporter.enable = true;
      };
      message = "services.pascaline.user: no user 'inference' is declared, must be one of this host; declare users.users.inference with its group, or leave the option out";
    };
    addressOnNoInterface = {
      module.hardware.pascaline.network.address = "10.10.1.1";
      message = "hardware.pascaline.network.address: 10.10.1.1 is for no interface, must be for one; set one of hardware.pascaline.network.name, mac, driver; on the host, \"ip -brief link\" lists names and MAC addresses, and \"ethtool --driver NAME\" a driver";
    };
    addressOnTwoInterfaces = {
      module.hardware.pascaline.network = {
        address = "10.10.1.1";
        driver = "ixgbe";
        name = "eno1";
      };
      message = "hardware.pascaline.network.address: 10.10.1.1 is for driver and name, must be for one; set one of hardware.pascaline.network.name, mac, driver; on the host, \"ip -brief link\" lists names and MAC addresses, and \"ethtool --driver NAME\" a driver";
    };
    missingModel = {
      module = on (instance "emily" { model = "emilie"; }) // {
        services.pascaline.models.emily = {
          path = "/data/emily.gguf";
          sha256 = digest;
        };
      };
      message = "services.pascaline.instances.emily.model: no model 'emilie' is declared, must be one of: emily; declare services.pascaline.models.emilie";
    };
    noModel = {
      module = on (instance "emily" { });
      message = "services.pascaline.instances.emily: set exactly one of model (a name in services.pascaline.models) and settings.model";
    };
    missingDigest = {
      module.services.pascaline.models.emily.path = "/data/emily.gguf";
      message = "services.pascaline.models.emily.sha256: not set, must be the file's 64 hexadecimal digits; compute it with: sha256sum FILE";
    };
    digestsOfNoParts = {
      module.services.pascaline.models.emily = {
        path = "/data/emily.gguf";
        sha256 = [
          digest
          digest
        ];
      };
      message = "services.pascaline.models.emily.sha256: 2 checksums are for a split model of as many parts, so the file's name must end in -00001-of-00002.gguf; name the first part, or give the one checksum of a whole file";
    };
    twoSources = {
      module.services.pascaline.models.emily = {
        path = "/data/emily.gguf";
        url = "https://models.example.org/emily.gguf";
        sha256 = digest;
      };
      message = "services.pascaline.models.emily: set exactly one of url and path";
    };
    secretInStore = {
      module = on (instance "emily" (lib.recursiveUpdate builtinModel { settings.api_key = "secret"; }));
      message = "services.pascaline.instances.emily.settings.api_key: a secret here would be readable in the Nix store; use services.pascaline.instances.emily.apiKeyFile";
    };
    shortStop = {
      module = on (instance "emily" (lib.recursiveUpdate builtinModel { settings.drain_timeout = 300; }));
      message = "services.pascaline.instances.emily.stopTimeoutSec: 90 s end before the drain does, must be greater than settings.drain_timeout (300)";
    };
    noWorkers = {
      module.services.pascaline.router.enable = true;
      message = "services.pascaline.router.workers: empty, must name at least one API, for example [ \"http://127.0.0.1:30000\" ]";
    };
    openRouter = {
      module.services.pascaline.router = {
        enable = true;
        workers = [ "http://127.0.0.1:30000" ];
        host = "0.0.0.0";
        openFirewall = true;
      };
      message = "services.pascaline.router.openFirewall: the router would be open to everyone, must have an API key; set services.pascaline.router.apiKeyFile";
    };
    unheardAlerts = {
      module.services.pascaline.monitoring.enable = true;
      message = "services.pascaline.monitoring.alertmanager.webhookUrl: not set, so that no one would hear of an alert; set it, or services.prometheus.alertmanager.configuration or configText, or services.pascaline.monitoring.alertmanager.enable = false";
    };
  };

  typeErrors = {
    badDigest.services.pascaline.models.emily.sha256 = "abc";
    badCapability.hardware.pascaline.driver = {
      enable = true;
      computeCapability = "pascal";
    };
    wholeDisk.hardware.pascaline.cloudlab = {
      enable = true;
      rootPartition = "/dev/sda";
    };
    keyInStore = instance "emily" {
      gpus = [ ];
      apiKeyFile = "/nix/store/00000000000000000000000000000000-key";
    };
    unknownOption.services.pascaline.instances.emily.portt = 1;
    noNode = instance "emily" {
      gpus = [ ];
      numaNode = [ ];
    };
    otherLimits = instance "emily" {
      gpus = [ ];
      limits = ./limits/other.json;
    };
    halfAddress.hardware.pascaline.network = {
      address = "10.10.1";
      name = "eno1";
    };
  };

  # A host with what its profile brings.
  smallFleet = {
    instances.emily = builtinModel;
    hosts.only = {
      address = "10.0.0.1";
      network = "dhcp";
      profile = "c240g5";
      instances = [ "emily" ];
    };
  };

  # A router and a Grafana that all may use.
  openFleet = {
    instances.emily = builtinModel;
    hosts.only = {
      address = "10.0.0.1";
      network = "dhcp";
      instances = [ "emily" ];
      roles = [
        "monitoring"
        "router"
      ];
    };
    alertWebhook = "http://127.0.0.1:9099/";
    apiKeyFile = "/etc/pascaline/api-key";
    clients = "everyone";
    grafanaClients = [
      "10.1.0.0/16"
      "10.1.2.0/24"
    ];
    grafanaPasswordFile = "/etc/pascaline/grafana-password";
  };

  badFleets = {
    noNetwork.hosts.a.address = "10.0.0.1";
    otherNetwork.hosts.a = {
      address = "10.0.0.1";
      network = "static";
    };
    misspeltNetwork.hosts.a = {
      address = "10.0.0.1";
      network.nmae = "eno1";
    };
    routerForNobody.hosts.a = dhcp // {
      roles = [ "router" ];
    };
    badClient = {
      hosts.a = dhcp;
      clients = [ "10.0.0" ];
    };
    clientsWithoutKey = {
      hosts.a = dhcp;
      clients = "everyone";
    };
    grafanaWithoutPassword = {
      hosts.a = dhcp;
      grafanaClients = [ "10.0.0.0/8" ];
    };
    unknownInstance.hosts.a = dhcp // {
      instances = [ "emilie" ];
    };
    unknownRole.hosts.a = dhcp // {
      roles = [ "watcher" ];
    };
    unknownKey.hosts.a = dhcp // {
      gpus = 1;
    };
    unknownProfile.hosts.a = dhcp // {
      profile = "c220g6";
    };
    ownPort = {
      hosts.a = dhcp;
      instances.emily.settings.port = 8000;
    };
    noAddress.hosts.a.network = "dhcp";
    nameForAddress.hosts.a = {
      address = "gpu-1.example.org";
      network = "dhcp";
    };
    halfGpu.hosts.a = dhcp // {
      gpu.card = "tesla-p4";
    };
    misspeltKey = {
      hosts.a = dhcp;
      instnaces = { };
    };
    unknownModel = {
      hosts.a = dhcp;
      instances.emily.model = "emilie";
      models.emily = { };
    };
    sameAddress.hosts = {
      a = dhcp;
      b = dhcp;
    };
  };
}
