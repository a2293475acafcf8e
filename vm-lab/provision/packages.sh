#!/bin/sh
# Installs the Debian packages of a machine of the lab: as root, on Debian 12, in a machine or a chroot.
set -eu
export DEBIAN_FRONTEND=noninteractive

# First what the machine itself needs, then podwire (docs/install/systemd.md; libxtables12 is found by ldconfig), then
# what looks at packets, then what nodes have beside podwire.
apt-get update -qq
# shellcheck disable=SC2046  # words, one package each
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $(sed 's/#.*//' << 'END'
    systemd-sysv udev dbus kmod openssh-server
    iproute2 iputils-ping procps less curl ca-certificates
    python3 python3-venv libxtables12 nftables iptables haproxy
    tcpdump conntrack iperf3
    wireguard-tools ipvsadm ipset containerd runc containernetworking-plugins busybox-static firewalld network-manager
END
)

# They are here for scenarios, which start them; a plain node has none of them running.
for unit in haproxy containerd firewalld NetworkManager NetworkManager-wait-online NetworkManager-dispatcher \
    nftables ipvsadm; do
    systemctl --quiet disable "$unit" 2> /dev/null
    if [ -d /run/systemd/system ]; then
        systemctl stop "$unit"
    fi
done
