#!/bin/sh
# Makes a machine that has podwire (podwire.sh) one of the lab's: its network and files, and on a node the daemon.
#
#     host.sh HOST NODES        HOST is router, client, or node1 …; NODES is how many nodes the lab has
#
# KUBERNETES=1: the node gets its network only; kubernetes.sh does the rest.
set -eu
host=$1 nodes=$2

/opt/podwire/bin/python -m lab.guest "$host" --nodes "$nodes"
sysctl --quiet --system > /dev/null

# The cables get their names, which they have at later boots anyway, and systemd-networkd their addresses; the
# management interface is not in its files, or was its own before.
udevadm control --reload
udevadm trigger --type=devices --action=add --subsystem-match=net
# Not trigger --settle: it waits for the names that interfaces had.
udevadm settle --timeout=60
systemctl --quiet enable systemd-networkd
systemctl restart systemd-networkd

case $host in
    node*) ;;
    *) exit 0 ;;
esac
if [ -z "${KUBERNETES:-}" ]; then
    systemctl --quiet enable podwire
    systemctl restart podwire
    podwire status
fi
