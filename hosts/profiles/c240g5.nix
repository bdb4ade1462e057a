# CloudLab c240g5: a c220g5 with one Tesla P100 12 GB, which hosts/default.nix knows.
{
  imports = [ ./c220g5.nix ];
}
