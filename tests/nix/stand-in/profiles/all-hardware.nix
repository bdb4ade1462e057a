# Stands for NixOS' own profile of this name, which only adds kernel modules.
{ }
