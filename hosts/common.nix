# What all hosts of this fleet share.
{
  # The release whose defaults they keep, whatever release they run.
  system.stateVersion = "26.05";
}
