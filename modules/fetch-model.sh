# Brings one model into the store and verifies it: fetch-model SOURCE TARGET SHA256...
# SOURCE is a URL (an interrupted download is resumed) or a file. With several checksums the model is split: SOURCE and TARGET are
# its first part (NAME-00001-of-0000N.gguf), and the others are beside it. Exit codes: 0 in place and verified, 1 not fetched (try
# again), 2 wrong usage, 3 wrong checksum (the file is deleted: trying again would fetch the same).
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: fetch-model SOURCE TARGET SHA256..." >&2
  exit 2
fi

digest() {
  sha256sum -- "$1" | cut -d ' ' -f 1
}

# part NAME NUMBER COUNT: the name of another part of the model whose first part has this name.
part() {
  local first other
  printf -v first -- '-00001-of-%05d.' "$3"
  printf -v other -- '-%05d-of-%05d.' "$2" "$3"
  case $1 in
  *"$first"*) printf '%s' "${1%"$first"*}$other${1##*"$first"}" ;;
  *)
    echo "$1 is not the first of $3 parts: its name must end in ${first}gguf, or one checksum be given" >&2
    exit 2
    ;;
  esac
}

# The stamp spares hashing gigabytes at every boot: it names the digest, size, time of change and inode of the file that was
# verified. The kernel sets that time at each write, and no program can set it back.
stamp() {
  printf '%s %s' "$expected" "$(stat -c '%s %.9Z %i' -- "$target")"
}

get() {
  curl --fail --location --silent --show-error --retry 3 "$@" --output "$partial" -- "$source"
}

# What an earlier run left may be damaged (a power cut), may be all there is, or may be of a server that cannot resume.
download() {
  local code=0 resumed=
  [ ! -s "$partial" ] || resumed=yes
  get --continue-at - || code=$?
  if [ -n "$resumed" ] && [ -s "$partial" ] && [ "$(digest "$partial")" = "$expected" ]; then
    return 0
  fi
  case $code in
  0) [ -n "$resumed" ] || return 0 ;;
  # 33: no ranges; 36: bad resume; 22: a status of 400 or more, 416 among them.
  22 | 33 | 36) [ -n "$resumed" ] || return 1 ;;
  *) return 1 ;;
  esac
  echo "resuming failed (curl exit code $code, or another checksum), fetching $source from the start" >&2
  rm -f -- "$partial"
  get
}

copy() {
  if [ ! -r "$source" ]; then
    echo "cannot read $source: it must be a file that the pascaline user may read" >&2
    return 1
  fi
  local needed free
  needed=$(stat -L -c %s -- "$source")
  free=$(df --output=avail -B1 -- "$(dirname -- "$target")" | tail -n 1)
  if [ "$free" -lt "$needed" ]; then
    echo "$(dirname -- "$target") has $free bytes free, the copy of $source needs $needed; make room, or set services.pascaline.stateDir to a larger disk" >&2
    return 1
  fi
  cp -- "$source" "$partial"
}

# Brings $source to $target and compares it with $expected.
fetch() {
  partial=$target.partial
  if [ -e "$target" ] && [ "$(cat -- "$target.verified" 2>/dev/null)" = "$(stamp)" ]; then
    echo "$target is in place, verified before"
    return 0
  fi
  if [ ! -e "$target" ]; then
    case $source in
    http://* | https://* | file://*) download || exit 1 ;;
    *) copy || exit 1 ;;
    esac
    sync -- "$partial"
    mv -- "$partial" "$target"
  fi
  found=$(digest "$target")
  if [ "$found" != "$expected" ]; then
    rm -f -- "$target" "$target.verified"
    echo "$source has sha256 $found, must be $expected; the file was deleted: correct services.pascaline.models.<name>.sha256, or the source" >&2
    exit 3
  fi
  stamp >"$target.verified"
  echo "$target is in place and verified"
}

first_source=$1
first_target=$2
shift 2
mkdir -p -- "$(dirname -- "$first_target")"
number=0
for given in "$@"; do
  number=$((number + 1))
  expected=${given,,}
  source=$first_source
  target=$first_target
  if [ $# -gt 1 ]; then
    source=$(part "$first_source" "$number" $#)
    target=$(part "$first_target" "$number" $#)
  fi
  fetch
done
