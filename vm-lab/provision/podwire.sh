#!/bin/sh
# Installs podwire of this checkout as docs/install/systemd.md says: as root, after packages.sh, in a machine or a
# chroot. The unit stays disabled: not every machine of the lab is a node.
#
# WHEELS=DIR: take podwire and all it needs from the wheels there, ask no index and compile nothing.
set -eu
cd "$(dirname "$0")/../.."

test -x /opt/podwire/bin/python || python3 -m venv /opt/podwire
pip() { /opt/podwire/bin/pip --quiet --disable-pip-version-check "$@"; }
if [ -n "${WHEELS:-}" ]; then
    # pip has checked the hashes when these were made.
    pip install --no-index --no-deps "$WHEELS"/*.whl
else
    # What compiles the one package without a wheel.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-dev gcc libc6-dev > /dev/null
    pip install --require-hashes -r requirements/runtime.txt
    pip install --no-deps --force-reinstall .
fi
/opt/podwire/bin/podwire install --host-root / --no-conflist
ln -sf /opt/podwire/bin/podwire /usr/local/bin/podwire

mkdir -p /etc/podwire/manifests
if [ ! -e /etc/podwire/config.yaml ]; then
    install -m 644 vm-lab/provision/config.yaml /etc/podwire/config.yaml
fi
podwire config check
cp deploy/systemd/podwire.service /etc/systemd/system/

# Beside systemd-networkd, NetworkManager and firewalld; without them the files do nothing.
install -D -m 644 deploy/systemd/10-podwire.network -t /etc/systemd/network
install -D -m 644 deploy/systemd/networkd.conf /etc/systemd/networkd.conf.d/50-podwire.conf
install -D -m 644 deploy/systemd/networkmanager.conf /etc/NetworkManager/conf.d/50-podwire.conf
for kind in zones policies services; do
    install -D -m 644 deploy/firewalld/$kind/*.xml -t /etc/firewalld/$kind
done
firewall-offline-cmd --check-config > /dev/null

if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
