# CloudLab c220g5: two Xeon Silver 4114, 192 GB, one SSD and one disk. Its published form has no GPU, so none is assumed:
# a host that has one says so with `gpu` in fleet.nix.
{
  hardware.pascaline.cloudlab.enable = true;
  hardware.cpu.intel.updateMicrocode = true;
}
