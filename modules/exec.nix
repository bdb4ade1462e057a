# Quotes a list of arguments for ExecStart. systemd's quoting differs from the shell's: `%` and `$` are special in all quotes.
{ lib }:
let
  quoted =
    argument:
    if builtins.match "[[:alnum:],._+:@%/=-]+" argument != null then
      argument
    else
      builtins.toJSON argument;
  escaped = argument: lib.replaceStrings [ "%" "$" ] [ "%%" "$$" ] (quoted (toString argument));
in
lib.concatMapStringsSep " " escaped
