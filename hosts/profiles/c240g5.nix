# CloudLab c240g5: a c220g5 with one Tesla P100 12 GB (compute capability 6.0).
{ lib, ... }:
{
  imports = [ ./c220g5.nix ];
  hardware.pascaline.driver = {
    enable = lib.mkDefault true;
    computeCapability = lib.mkDefault "6.0";
  };
}
