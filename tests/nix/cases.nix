# Configurations that must evaluate, that must fail with a given message, and that the option types must refuse.
{
  lib,
  # Version of the driver's default branch.
  newest ? "595.84",
}:
let
  digest = lib.concatStrings (lib.genList (_: "ab") 32);
  driver.hardware.pascaline.driver.enable = true;
  instance = name: settings: { services.pascaline.instances.${name} = settings; };
  on = module: { imports = [ driver ] ++ lib.toList module; };
  builtinModel.settings.model = "builtin:smollm2-135m";
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
    exporter = on {
      services.pascaline.exporter = {
        enable = true;
        openFirewall = true;
      };
    };
    monitoring.services.pascaline.monitoring = {
      enable = true;
      alertmanager.webhookUrl = "http://127.0.0.1:9099/";
      grafana.openFirewall = true;
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
      openFirewall = true;
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
    "router.nix" = working.router;
  };

  failing = {
    newDriver = {
      module = on { hardware.pascaline.driver.branch = "stable"; };
      message = "hardware.pascaline.driver.branch: driver ${newest} of branch 'stable' ignores Pascal, must be R580 or older; set hardware.pascaline.driver.branch = \"legacy_580\" and do not set hardware.nvidia.package";
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
      message = "services.pascaline.instances.emily.openFirewall: the API listens on 127.0.0.1 only, must listen on an outer address; set settings.host = \"0.0.0.0\"";
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
        openFirewall = true;
      };
      message = "services.pascaline.router.openFirewall: the router would be open to everyone, must have an API key; set services.pascaline.router.apiKeyFile";
    };
    unheardAlerts = {
      module.services.pascaline.monitoring.enable = true;
      message = "services.pascaline.monitoring.alertmanager.webhookUrl: not set, so that no one would hear of an alert; set it, or services.prometheus.alertmanager.configuration, or services.pascaline.monitoring.alertmanager.enable = false";
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
  };

  # A host with what its profile brings.
  smallFleet = {
    instances.emily = builtinModel;
    hosts.only = {
      address = "10.0.0.1";
      profile = "c240g5";
      instances = [ "emily" ];
    };
  };

  badFleets = {
    unknownInstance.hosts.a = {
      address = "10.0.0.1";
      instances = [ "emilie" ];
    };
    unknownRole.hosts.a = {
      address = "10.0.0.1";
      roles = [ "watcher" ];
    };
    unknownKey.hosts.a = {
      address = "10.0.0.1";
      gpus = 1;
    };
    unknownProfile.hosts.a = {
      address = "10.0.0.1";
      profile = "c220g6";
    };
    ownPort = {
      hosts.a.address = "10.0.0.1";
      instances.emily.settings.port = 8000;
    };
    noAddress.hosts.a.roles = [ "router" ];
    nameForAddress.hosts.a.address = "gpu-1.example.org";
    halfGpu.hosts.a = {
      address = "10.0.0.1";
      gpu.card = "tesla-p4";
    };
    misspeltKey = {
      hosts.a.address = "10.0.0.1";
      instnaces = { };
    };
    unknownModel = {
      hosts.a.address = "10.0.0.1";
      instances.emily.model = "emilie";
      models.emily = { };
    };
    sameAddress.hosts = {
      a.address = "10.0.0.1";
      b.address = "10.0.0.1";
    };
  };
}
