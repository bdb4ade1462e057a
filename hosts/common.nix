# What all hosts of this fleet share.
{
  # The release whose defaults they keep after upgrades.
  system.stateVersion = "26.05";
}
