# The CUDA 11.8 toolkit, the last one meant for Pascal, from the pinned nixpkgs that still has it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.hardware.pascaline.cuda;
  toolkit = pkgs.symlinkJoin {
    name = "cuda-toolkit-${cfg.packages.cudaMajorMinorVersion or "11.8"}";
    # Headers, libraries and programs of a component are separate outputs. Static libraries take gigabytes; nvcc links one.
    paths = lib.concatMap (
      component:
      map (output: component.${output}) (
        lib.filter (output: output != "static" || lib.getName component == "cuda_cudart") component.outputs
      )
    ) (cfg.components cfg.packages);
  };
in
{
  options.hardware.pascaline.cuda = {
    enable = lib.mkEnableOption "the CUDA 11.8 toolkit in every user's environment, for programs of your own; serving a model does not need it";

    packages = mkOption {
      type = types.lazyAttrsOf types.raw;
      default = pkgs.cudaPackages_pascal;
      defaultText = lib.literalExpression "pkgs.cudaPackages_pascal";
      example = lib.literalExpression "pkgs.cudaPackages_12_9";
      description = "CUDA package set that {option}`hardware.pascaline.cuda.components` chooses from. `pkgs.cudaPackages_pascal` is CUDA 11.8 from nixpkgs 25.05, the last release that has it.";
    };

    components = mkOption {
      type = types.functionTo (types.listOf types.package);
      default =
        cuda: with cuda; [
          cuda_cccl
          cuda_cudart
          cuda_nvcc
          cuda_nvprof
          cuda_nvrtc
          cudnn
          libcublas
          nccl
        ];
      defaultText = lib.literalExpression "cuda: with cuda; [ cuda_cccl cuda_cudart cuda_nvcc cuda_nvprof cuda_nvrtc cudnn libcublas nccl ]";
      example = lib.literalExpression "cuda: [ cuda.cuda_nvcc cuda.cuda_cudart ]";
      description = "Packages of the set that make up the toolkit: its `bin` is in every user's `PATH`, and `CUDA_PATH` names its folder.";
    };

    cacheDir = mkOption {
      type = types.path;
      default = "/var/cache/pascaline-cuda";
      example = "/data/cuda-cache";
      description = "Persistent folder for kernels that the driver compiles from PTX (`CUDA_CACHE_PATH`). Without it, every start may have to compile them again, which takes up to a minute.";
    };

    debug = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether every kernel launch waits until the kernel ends (`CUDA_LAUNCH_BLOCKING=1`). Errors then name the right launch, but everything is slow.";
    };
  };

  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ toolkit ];
    environment.variables = {
      CUDA_PATH = "${toolkit}";
      CUDA_CACHE_PATH = cfg.cacheDir;
    }
    // lib.optionalAttrs cfg.debug { CUDA_LAUNCH_BLOCKING = "1"; };

    # Sticky and writable by everyone, like /tmp: every user's programs cache there.
    systemd.tmpfiles.settings."10-pascaline-cuda".${cfg.cacheDir}.d.mode = "1777";
  };
}
