# Development: uv for the workspace, CUDA 11.8 for the kernels, promtool for the rules, formatters and linters for Nix.
{ pkgs }:
pkgs.mkShell {
  packages = [
    pkgs.deadnix
    pkgs.nixfmt-tree
    pkgs.prometheus.cli
    pkgs.python312
    pkgs.statix
    pkgs.uv
    pkgs.cudaPackages_pascal.cuda_cuobjdump
    pkgs.cudaPackages_pascal.cuda_nvcc
    pkgs.cudaPackages_pascal.cuda_nvdisasm
    pkgs.cudaPackages_pascal.cuda_nvrtc
  ];
  # uv's own interpreters and the wheels' libraries do not find Nix' loader; use the interpreter above.
  UV_PYTHON_DOWNLOADS = "never";
  UV_PYTHON = pkgs.lib.getExe pkgs.python312;
  LD_LIBRARY_PATH = pkgs.lib.makeLibraryPath [
    pkgs.stdenv.cc.cc.lib
    pkgs.zlib
  ];
}
