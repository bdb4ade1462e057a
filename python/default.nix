# The Python environments, from wheels.json alone: every wheel a fixed-output derivation, installed offline by
# ./install-environment (which is tested on other distributions too) and patched for the Nix store by autoPatchelf.
{
  lib,
  stdenv,
  autoPatchelfHook,
  fetchPypi,
  fetchurl,
  linkFarm,
  makeWrapper,
  python312,
  runCommand,
  uv,
  zlib,
  cudaPackages_pascal,
}:
{
  # "pypi": torch 2.7.1 as locked (CUDA 12.6, contains sm_60). "cu118": PyTorch's own build of the same version with CUDA 11.8.
  torchFlavour ? "pypi",
}:
let
  locked = lib.importJSON ./wheels.json;
  version = (lib.importTOML ./pascaline/pyproject.toml).project.version;

  # Name-version-python-abi-platform.whl, the five parts of a wheel's file name.
  wheelParts =
    file:
    let
      parts = builtins.match "(.+)-([^-]+)-([^-]+)-([^-]+)-([^-]+)\\.whl" file;
    in
    lib.listToAttrs (
      lib.zipListsWith lib.nameValuePair [ "pname" "version" "python" "abi" "platform" ] parts
    );

  torchCu118 = fetchurl {
    name = "torch-2.7.1+cu118-cp312-cp312-manylinux_2_28_x86_64.whl";
    url = "https://download.pytorch.org/whl/cu118/torch-2.7.1%2Bcu118-cp312-cp312-manylinux_2_28_x86_64.whl";
    sha256 = "91454dcfdb81f181fdf216d6d6d9912fbd8795578b90384b3b8b8132737072bb";
  };
  cu118Libraries = map lib.getLib (
    with cudaPackages_pascal;
    [
      cuda_cudart
      cuda_cupti
      cuda_nvrtc
      cuda_nvtx
      cudnn
      libcublas
      libcufft
      libcurand
      libcusolver
      libcusparse
      nccl
    ]
  );
  cu118 =
    assert lib.assertOneOf "torchFlavour" torchFlavour [
      "pypi"
      "cu118"
    ];
    torchFlavour == "cu118";

  fetchWheel =
    name: wheel:
    if cu118 && name == "torch" then
      torchCu118
    else
      fetchPypi (
        wheelParts wheel.file
        // {
          format = "wheel";
          dist = (wheelParts wheel.file).python;
          inherit (wheel) sha256;
        }
      );
  # torch 2.7.1+cu118 takes CUDA's libraries from the pinned toolkit instead of the CUDA 12 wheels; torchvision's own wheel loads one.
  wanted =
    name:
    !cu118
    || !(lib.hasPrefix "nvidia-" name && lib.hasSuffix "-cu12" name)
    || name == "nvidia-cuda-runtime-cu12";
  wheelsOf =
    environment:
    map (name: {
      name = locked.wheels.${name}.file;
      path = fetchWheel name locked.wheels.${name};
    }) (lib.filter wanted locked.environments.${environment});

  # Our own packages as wheels, so that they are installed as any other.
  ownWheel =
    name:
    let
      wheel = python312.pkgs.buildPythonPackage {
        pname = name;
        inherit version;
        src = lib.fileset.toSource {
          root = ./. + "/${name}";
          fileset = lib.fileset.unions [
            (./. + "/${name}/pyproject.toml")
            (./. + "/${name}/README.md")
            (./. + "/${name}/src")
          ];
        };
        pyproject = true;
        build-system = [ python312.pkgs.hatchling ];
        dontCheckRuntimeDeps = true;
        doCheck = false;
      };
    in
    {
      name = "${lib.replaceStrings [ "-" ] [ "_" ] name}-${version}-py3-none-any.whl";
      path = "${wheel.dist}/${lib.replaceStrings [ "-" ] [ "_" ] name}-${version}-py3-none-any.whl";
    };
  ownWheels =
    name:
    map ownWheel [
      "gguf-acceptance"
      name
    ];

  environment =
    {
      name,
      wheels,
      libraries ? [ ],
      postInstall ? "",
    }:
    stdenv.mkDerivation {
      pname = name;
      inherit version postInstall;
      dontUnpack = true;
      dontBuild = true;
      # Stripping would take hours on 3 GB of CUDA libraries and change nothing that matters.
      dontStrip = true;
      nativeBuildInputs = [
        autoPatchelfHook
        uv
      ];
      buildInputs = [
        stdenv.cc.cc.lib
        zlib
      ]
      ++ libraries;
      autoPatchelfIgnoreMissingDeps = [
        # The driver's own libraries come from the running system.
        "libcuda.so.1"
        "libnvidia-ml.so.1"
        # cuFile reads remote disks by RDMA with them; torch brings it, serving never calls it.
        "libibverbs.so.1"
        "libmlx5.so.1"
        "librdmacm.so.1"
      ];
      # Their own folder too: cuDNN and NVRTC open their parts by name, which autoPatchelf cannot see.
      appendRunpaths = [
        "$ORIGIN"
        "/run/opengl-driver/lib"
      ];
      installPhase = ''
        runHook preInstall
        sh ${./install-environment} $out ${lib.getExe python312} ${linkFarm "${name}-wheels" wheels}
        runHook postInstall
      '';
    };

  light = environment {
    name = "pascaline-environment";
    wheels = wheelsOf "pascaline" ++ ownWheels "pascaline";
  };

  builtin = environment {
    name = "pascaline-builtin-environment";
    wheels = wheelsOf "builtin" ++ ownWheels "pascaline";
  };

  only =
    target: flags:
    runCommand "pascaline-${version}"
      {
        pname = "pascaline";
        inherit version;
        nativeBuildInputs = [ makeWrapper ];
        meta = {
          description = "Plans, serves, supervises and monitors language models on Pascal GPUs";
          license = lib.licenses.asl20;
          mainProgram = "pascaline";
          platforms = [ "x86_64-linux" ];
        };
      }
      ''
        mkdir -p $out/bin
        # For `doctor`, `top` and `plan` in a shell: NixOS keeps the driver's libraries where no program looks by itself.
        makeWrapper ${target}/bin/pascaline $out/bin/pascaline --suffix LD_LIBRARY_PATH : /run/opengl-driver/lib ${flags}
      '';

  # Kernels are compiled to sm_60 and sm_61 here, so that no host compiles at start.
  sglang-pascal-kernels =
    runCommand "sglang-pascal-kernels-${version}"
      {
        nativeBuildInputs = [ python312 ];
        # The name of NVRTC's library in every 11.x since 11.2.
        CUDA_NVRTC = "${lib.getLib cudaPackages_pascal.cuda_nvrtc}/lib/libnvrtc.so.11.2";
        CUDA_PTXAS = lib.getExe' cudaPackages_pascal.cuda_nvcc "ptxas";
      }
      ''
        PYTHONPATH=${./sglang-pascal/src} python -m sglang_pascal.kernels.build --output $out
      '';

  engine = environment {
    name = "pascaline-engine";
    wheels = wheelsOf "engine" ++ ownWheels "sglang-pascal";
    libraries = lib.optionals cu118 cu118Libraries;
    postInstall = ''
      ln -s ${sglang-pascal-kernels} $out/lib/python3.12/site-packages/sglang_pascal/kernels/prebuilt
    ''
    # SGLang imports torchvision's transforms, which are Python; its CUDA operators, built for CUDA 12, are never called.
    + lib.optionalString cu118 ''
      substituteInPlace $out/lib/python3.12/site-packages/torchvision/extension.py \
        --replace-fail "if t_major != tv_major:" "if False:"
    '';
  };
in
{
  inherit sglang-pascal-kernels;
  pascaline = only light "";
  pascaline-engine = engine;
  pascaline-router = environment {
    name = "pascaline-router";
    wheels = wheelsOf "router";
  };
  # With the built-in model, for tests that have an engine of their own.
  pascaline-builtin = only builtin "";
  # What `nix run` starts: the same with the engine beside it.
  pascaline-app = only builtin "--set-default PASCALINE_ENGINE_EXECUTABLE ${engine}/bin/python";
}
