# Instances: one supervised engine each, as pascaline-<name>.service.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline;
  instances = lib.filterAttrs (_: instance: instance.enable) cfg.instances;
  toml = pkgs.formats.toml { };

  defaults = import ./defaults.nix;
  cards = lib.importTOML ../python/pascaline/src/pascaline/cards/cards.toml;
  portOf = instance: instance.settings.port or defaults.ports.engine;
  agentPortOf = instance: instance.settings.agent_port or defaults.ports.agent;
  fractionOf =
    instance: instance.settings.mem_fraction_static or cards.gpu.settings.mem_fraction_static;
  drainOf = instance: instance.settings.drain_timeout or defaults.settings.drain_timeout;

  unitName = name: "pascaline-${name}";
  modelUnits =
    instance: lib.optional (instance.model != null) "pascaline-model-${instance.model}.service";

  # The user's settings, and those that only the host knows.
  settingsOf =
    name: instance:
    let
      # Also null for a name that is not declared; an assertion reports that.
      model = cfg.models.${toString instance.model} or null;
    in
    {
      served_model_name = name;
      engine_executable =
        if instance.settings.engine or defaults.settings.engine == "sglang" then
          "${cfg.enginePackage}/bin/python"
        else
          lib.getExe' instance.llamaCppPackage "llama-server";
    }
    // lib.optionalAttrs (model != null) {
      model = "${model.file}";
      model_sha256 = model.sha256;
    }
    // lib.optionalAttrs (instance.apiKeyFile != null) {
      # systemd copies the credential here; the file itself stays readable by root alone.
      api_key_file = "/run/credentials/${unitName name}.service/api-key";
    }
    // instance.settings;

  noLimits = {
    memoryMax = null;
    numaNode = null;
  };
  # What `pascaline service limits` wrote on the host, from the plan there.
  limitsOf =
    name: file:
    let
      limits = if file == null then noLimits else lib.importJSON file;
    in
    if lib.isAttrs limits && lib.attrNames limits == lib.attrNames noLimits then
      limits
    else
      throw "services.pascaline.instances.${name}.limits: ${toString file} is not what `pascaline service limits` writes: an object with memoryMax and numaNode; write it again";

  # Checked by the same code that reads it at start, so that a mistake fails the build and not the boot.
  configFile =
    name: instance:
    let
      rendered = toml.generate "pascaline-${name}.toml" instance.finalSettings;
    in
    if !instance.checkSettings then
      rendered
    else
      pkgs.runCommand "pascaline-${name}.toml" { nativeBuildInputs = [ cfg.package ]; } ''
        pascaline config check --no-host --config ${rendered}
        cp ${rendered} $out
      '';

  # All GPUs, although only some are used: CUDA counts the GPUs that it may open and NVML counts all, so that with a
  # narrower rule CUDA_VISIBLE_DEVICES would mean one card to the engine and another to the supervisor.
  nvidiaDevices = [
    "char-nvidia rw"
    "char-nvidia-frontend rw" # their older name
    "/dev/nvidiactl rw"
    "/dev/nvidia-uvm rw"
    "/dev/nvidia-uvm-tools rw"
  ];

  hardening = import ./hardening.nix;
  inherit (import ./listen.nix { inherit lib; }) isLoopback openedIsReachable;

  unit = name: instance: {
    description = "Language model ${name} (pascaline)";
    documentation = [ "man:systemd.service(5)" ];
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    requires = modelUnits instance;
    after = [
      "network-online.target"
      "nvidia-persistenced.service"
      "pascaline-gpu-limits.service"
    ]
    ++ modelUnits instance;
    # An engine that never loads is started 15 times; then the unit fails with its reason: after an hour if each load fails at
    # once, after nine if each takes as long as start_timeout (1800 s) allows. The instance counts its starts too (alert InstanceRestartLoop).
    startLimitIntervalSec = 43200;
    startLimitBurst = 15;

    environment = {
      # The order of nvidia-smi and NVML; CUDA's own default is "fastest first".
      CUDA_DEVICE_ORDER = "PCI_BUS_ID";
      CUDA_VISIBLE_DEVICES = lib.concatMapStringsSep "," toString instance.gpus;
      # Code that is compiled at run time is kept across boots: the driver's, and torch's where a CPU serves.
      CUDA_CACHE_PATH = "/var/cache/${unitName name}/cuda";
      TORCHINDUCTOR_CACHE_DIR = "/var/cache/${unitName name}/inductor";
      XDG_CACHE_HOME = "/var/cache/${unitName name}";
      HOME = "/var/lib/${unitName name}";
      # A tmpfs of this unit: the engine gets its API key by a file, which must not be written to a disk.
      TMPDIR = "/run/${unitName name}";
      LD_LIBRARY_PATH = "/run/opengl-driver/lib";
    }
    // instance.environment;

    # SGLang reads the card's memory and capability by nvidia-smi.
    path = lib.optional (instance.gpus != [ ]) (lib.getBin config.hardware.nvidia.package);

    serviceConfig =
      hardening
      // {
        Type = "notify";
        NotifyAccess = "main";
        ExecStart = "${lib.getExe cfg.package} serve --config ${instance.configFile}";
        User = cfg.user;
        Slice = instance.slice;
        WatchdogSec = 60;
        # The supervisor asks for more time while a model loads (EXTEND_TIMEOUT_USEC).
        TimeoutStartSec = 120;
        TimeoutStopSec = instance.stopTimeoutSec;
        # SIGTERM goes only to the supervisor, which drains; after TimeoutStopSec all remaining processes are killed.
        KillMode = "mixed";
        Restart = "on-failure";
        RestartSec = 5;
        RestartSteps = 6;
        RestartMaxDelaySec = 300;
        # Bad configuration, model, plan, missing program: the next start would fail in the same way.
        RestartPreventExitStatus = "2 3 7 8";
        LoadCredential = lib.optional (
          instance.apiKeyFile != null
        ) "api-key:${toString instance.apiKeyFile}";
        StateDirectory = unitName name;
        CacheDirectory = unitName name;
        RuntimeDirectory = unitName name;
        StateDirectoryMode = "0750";
        CacheDirectoryMode = "0750";
        RuntimeDirectoryMode = "0700";
        LimitNOFILE = 65536;
        LimitMEMLOCK = "infinity"; # pinned host buffers for transfers to the GPU
        # If the kernel kills the engine for lack of memory, the supervisor says so and starts it again; "kill" would end both.
        OOMPolicy = "continue";
        # torch and the driver's PTX compiler map memory that is writable and executable.
        MemoryDenyWriteExecute = false;
        # psutil reads /proc/meminfo and /proc/stat.
        ProcSubset = "all";
        # torch.distributed and SGLang enumerate the network interfaces, even for one GPU.
        RestrictAddressFamilies = hardening.RestrictAddressFamilies ++ [ "AF_NETLINK" ];
      }
      // lib.optionalAttrs (instance.memoryMax != null) { MemoryMax = instance.memoryMax; }
      // lib.optionalAttrs (instance.numaNode != null) {
        NUMAPolicy = "bind";
        NUMAMask = lib.concatMapStringsSep "," toString instance.numaNode;
        CPUAffinity = "numa";
      }
      // lib.optionalAttrs (instance.gpus != [ ]) {
        # The driver's devices, and no others.
        PrivateDevices = false;
        DevicePolicy = "closed";
        DeviceAllow = nvidiaDevices;
        # The device nodes belong to root in the host's user namespace.
        PrivateUsers = false;
      };
  };

  pairs = lib.concatLists (
    lib.imap0 (i: a: map (b: { inherit a b; }) (lib.drop (i + 1) (lib.attrNames instances))) (
      lib.attrNames instances
    )
  );
  sharedGpus = { a, b }: lib.intersectLists instances.${a}.gpus instances.${b}.gpus;
  gpuIndices = lib.unique (lib.concatMap (instance: instance.gpus) (lib.attrValues instances));
  fractionOnGpu =
    gpu:
    lib.foldl' (sum: instance: sum + fractionOf instance) 0.0 (
      lib.filter (instance: lib.elem gpu instance.gpus) (lib.attrValues instances)
    );
in
{
  imports = [
    ./common.nix
    ./driver.nix
    ./models.nix
  ];

  options.services.pascaline.instances = mkOption {
    default = { };
    example = lib.literalExpression ''
      {
        emily = {
          model = "emily";
          gpus = [ 0 ];
          settings = {
            card = "tesla-p4";
            context_length = 4096;
          };
        };
      }
    '';
    description = "Engines to run, by name. Each becomes `pascaline-<name>.service`, and serves its model under that name.";
    type = types.attrsOf (
      types.submodule (
        instance@{ name, ... }:
        {
          options = {
            enable = mkOption {
              type = types.bool;
              default = true;
              example = false;
              description = "Whether the unit exists. If false, only the declaration stays.";
            };

            model = mkOption {
              type = types.nullOr types.str;
              default = null;
              example = "emily";
              description = "Name of a model in {option}`services.pascaline.models`, which is fetched and verified before the instance starts. `null`: `settings.model` names one.";
            };

            gpus = mkOption {
              type = types.listOf types.ints.unsigned;
              default = lib.optional config.hardware.pascaline.driver.enable 0;
              defaultText = lib.literalExpression "[ 0 ] if hardware.pascaline.driver.enable, else [ ]";
              example = [ 1 ];
              description = "GPUs that the instance may use, by the numbers of `nvidia-smi`. If empty, it runs on the CPU and sees no GPU.";
            };

            settings = mkOption {
              type = types.submodule { freeformType = toml.type; };
              default = { };
              example = {
                card = "tesla-p4";
                context_length = 4096;
                max_running_requests = 4;
                kv_cache.dtype = "int8";
              };
              description = "Settings of `pascaline serve`, under the names of its configuration file (docs/configuration.md). With llama.cpp, `placement.experts`, `placement.layers` and `placement.weights` say what stays in the host's memory. The build fails if the program would refuse the settings.";
            };

            checkSettings = mkOption {
              type = types.bool;
              default = true;
              example = false;
              description = "Whether the build runs `pascaline config check` on the settings, and fails if the program would refuse them.";
            };

            apiKeyFile = mkOption {
              type = types.nullOr types.externalPath;
              default = null;
              example = "/run/secrets/emily-api-key";
              description = "File on the host with the API key that requests must carry. It may be readable by root alone; it never enters the Nix store.";
            };

            openFirewall = mkOption {
              type = types.bool;
              default = false;
              example = true;
              description = "Whether the firewall opens the API to everyone. This needs `apiKeyFile`, and an address in `settings.host` that is not loopback.";
            };

            environment = mkOption {
              type = types.attrsOf types.str;
              default = { };
              example = {
                OMP_NUM_THREADS = "10";
              };
              description = "Environment variables of the unit. They override those that the module sets.";
            };

            slice = mkOption {
              type = types.str;
              default = "pascaline.slice";
              example = "system.slice";
              description = "systemd slice of the unit. A limit on `pascaline.slice` (`systemd.slices.pascaline`) applies to all instances together.";
            };

            limits = mkOption {
              type = types.nullOr types.path;
              default = null;
              example = lib.literalExpression "./emily-limits.json";
              description = "File that `pascaline service limits` wrote on the host: {option}`memoryMax` and {option}`numaNode` as they follow from the plan there, if weights stay in the host's memory. They are the defaults of these options. Write the file again after a change of the settings, the model or the memory.";
            };

            memoryMax = mkOption {
              type = types.nullOr types.str;
              default = (limitsOf name instance.config.limits).memoryMax;
              defaultText = lib.literalMD "as `limits` says; `null` without that file";
              example = "24G";
              description = "Host memory that the instance may use (`MemoryMax`). `null`: no limit.";
            };

            numaNode = mkOption {
              type = types.nullOr (
                types.coercedTo types.ints.unsigned lib.singleton (types.nonEmptyListOf types.ints.unsigned)
              );
              default = (limitsOf name instance.config.limits).numaNode;
              defaultText = lib.literalMD "as `limits` says; `null` without that file";
              example = [
                0
                1
              ];
              description = "NUMA node, or list of them, to whose CPUs and memory the instance is bound (`NUMAPolicy=bind`, `CPUAffinity=numa`). Choose the node of its GPU (`/sys/bus/pci/devices/*/numa_node`) if weights stay in the host's memory and the node has room for them (`pascaline plan`); if the firmware divides sockets into several nodes (sub-NUMA clusters, NPS), all nodes of the GPU's socket, which `pascaline doctor` names (`numa-distance`). `null`: the program chooses CPUs near its GPU itself, and the kernel may use other nodes' memory once theirs is full.";
            };

            stopTimeoutSec = mkOption {
              type = types.ints.positive;
              default = 90;
              example = 330;
              description = "Seconds from `systemctl stop` until the remaining processes are killed. It must be greater than `settings.drain_timeout` (default 60), the time for running requests to end.";
            };

            llamaCppPackage = lib.mkPackageOption pkgs "llama-cpp-pascal" {
              example = "pkgs.llama-cpp";
              extraDescription = "It is used if `settings.engine` is `\"llama.cpp\"`.";
            };

            finalSettings = mkOption {
              inherit (toml) type;
              readOnly = true;
              default = settingsOf name instance.config;
              defaultText = lib.literalMD "settings, with the model, the engine and the key that the other options name";
              example = {
                served_model_name = "emily";
              };
              description = "Content of the configuration file: `settings`, with the model, the program and the key from the other options.";
            };

            configFile = mkOption {
              type = types.package;
              readOnly = true;
              default = configFile name instance.config;
              defaultText = lib.literalMD "finalSettings, rendered";
              example = lib.literalExpression "\"pascaline plan --config \${config.services.pascaline.instances.emily.configFile}\"";
              description = "The configuration file, for other commands of `pascaline` on this host.";
            };
          };
        }
      )
    );
  };

  config = lib.mkIf (instances != { }) {
    services.pascaline.active = true;
    services.pascaline.ports = lib.concatMapAttrs (name: instance: {
      "services.pascaline.instances.${name}.settings.port" = portOf instance;
      "services.pascaline.instances.${name}.settings.agent_port" = agentPortOf instance;
    }) instances;

    assertions =
      map (gpu: {
        assertion = fractionOnGpu gpu <= 1.0;
        message = "GPU ${toString gpu}: the instances on it plan ${
          toString (builtins.floor (fractionOnGpu gpu * 100 + 0.5))
        } % of its memory together, must be at most 100 %; lower their settings.mem_fraction_static (0.9 where unset), or move one to another GPU";
      }) gpuIndices
      ++ map (pair: {
        assertion =
          sharedGpus pair == [ ]
          || (
            instances.${pair.a}.settings ? mem_fraction_static
            && instances.${pair.b}.settings ? mem_fraction_static
          );
        message = "services.pascaline.instances: ${pair.a} and ${pair.b} share GPU ${
          lib.concatMapStringsSep ", " toString (sharedGpus pair)
        }, must both set settings.mem_fraction_static; give each its share (for example 0.45), or move one to another GPU";
      }) pairs
      ++ lib.concatLists (
        lib.mapAttrsToList (name: instance: [
          {
            assertion = instance.model == null || cfg.models ? ${toString instance.model};
            message = "services.pascaline.instances.${name}.model: no model '${toString instance.model}' is declared, must be one of: ${lib.concatStringsSep ", " (lib.attrNames cfg.models)}; declare services.pascaline.models.${toString instance.model}";
          }
          {
            assertion = (instance.model == null) == (instance.settings ? model);
            message = "services.pascaline.instances.${name}: set exactly one of model (a name in services.pascaline.models) and settings.model";
          }
          {
            assertion = instance.openFirewall -> instance.apiKeyFile != null;
            message = "services.pascaline.instances.${name}.openFirewall: the API would be open to everyone, must have an API key; set services.pascaline.instances.${name}.apiKeyFile";
          }
          (openedIsReachable {
            option = "services.pascaline.instances.${name}.openFirewall";
            opened = instance.openFirewall;
            what = "the API";
            host = instance.settings.host or defaults.settings.host;
            hostOption = "services.pascaline.instances.${name}.settings.host";
          })
          {
            assertion =
              instance.openFirewall
              || instance.apiKeyFile != null
              || instance.settings ? api_key_file
              || instance.settings.allow_unauthenticated or false
              || lib.all isLoopback [
                (instance.settings.host or defaults.settings.host)
                (instance.settings.agent_host or defaults.settings.agent_host)
              ];
            message = "services.pascaline.instances.${name}: without an API key others could use the API or read the agent; set services.pascaline.instances.${name}.apiKeyFile, or settings.allow_unauthenticated = true if the network itself admits nobody else";
          }
          {
            assertion = !(instance.settings ? api_key);
            message = "services.pascaline.instances.${name}.settings.api_key: a secret here would be readable in the Nix store; use services.pascaline.instances.${name}.apiKeyFile";
          }
          {
            assertion = instance.gpus == [ ] || config.hardware.pascaline.driver.enable;
            message = "services.pascaline.instances.${name}.gpus: no driver is declared for GPU ${
              lib.concatMapStringsSep ", " toString instance.gpus
            }; set hardware.pascaline.driver.enable = true, or gpus = [ ] for the CPU";
          }
          {
            assertion = instance.stopTimeoutSec > drainOf instance;
            message = "services.pascaline.instances.${name}.stopTimeoutSec: ${toString instance.stopTimeoutSec} s end before the drain does, must be greater than settings.drain_timeout (${toString (drainOf instance)})";
          }
        ]) instances
      );

    systemd.slices.pascaline.description = "Language models";
    systemd.services = lib.mapAttrs' (
      name: instance: lib.nameValuePair (unitName name) (unit name instance)
    ) instances;

    networking.firewall.allowedTCPPorts = lib.concatMap (
      instance: lib.optional instance.openFirewall (portOf instance)
    ) (lib.attrValues instances);
  };
}
