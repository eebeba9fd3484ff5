#!/bin/sh
# Before each `docker compose up`: credentials where there are none, and folders that the services' users may write.
# As root, since it gives things away; without a network, and gone before anything else begins.
set -eu
run=/runs/${STREAMOPD_RUN:?the name of the run folder}

python -m streamopd secrets /secrets
chmod 711 /secrets
own() { chown "$1:10000" "/secrets/$2"; chmod 400 "/secrets/$2"; }
own 10001 supervisor; own 10001 learner; own 10001 packer; own 10001 evaluator
own 10002 redis.acl
own 10003 feeder; own 10004 generator; own 10005 teacher

mkdir -p "$run/blobs" "$run/state"
[ "$(stat -c %u "$run")" = 10001 ] || chown -R 10001:10000 "$run"
chown 10001:10000 "$run" "$run/state" "$run/blobs"
chown 10001:10000 /blobs; chmod 2770 /blobs   # who holds a group writes its payload, and removes the one before
chown 10002:10000 /data; chmod 700 /data

# Bringing services up is a new try: a run that failed or was stopped goes on. One that is complete stays so.
[ "$(cat "$run/state/over" 2>/dev/null)" = completed ] || rm -f "$run/state/over" "$run/state/stop"
