#!/usr/bin/env bash
# First process of an emulated machine (cluster.py starts it in namespaces of its own): machine.sh NAME ADDRESS DIR
set -eu
name=$1 address=$2 dir=$3
export SLURM_CONF=$dir/slurm.conf
hostname "$name"
mount --bind "$dir/hosts" /etc/hosts
mount --bind "$dir/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm # gloo and DeepSpeed share memory inside a node only
mount -t proc proc /proc
ip link set lo up
if [[ $name == login ]]; then
    ip link add br0 type bridge
    ip addr add "$address/24" dev br0
    ip link set br0 up
    munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/log/munged" &
    until [[ -S $dir/munge/socket ]]; do sleep 0.05; done
    slurmctld -D &
else
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done # cluster.py plugs it in
    ip addr add "$address/24" dev eth0
    ip link set eth0 up
    slurmd -D -N "$name" &
fi
while :; do # pid 1 stays, and reaps orphans
    sleep 3600 &
    wait $! || :
done
