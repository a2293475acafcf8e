#!/bin/sh
# Makes a node of a Kubernetes cluster by kubeadm, without kube-proxy, and on node1 puts podwire into the cluster as
# docs/install/kubeadm.md says: as root, after host.sh, with internet.
#
#     TOKEN=abcdef.0123456789abcdef kubernetes.sh HOST NODES
#
# node1 becomes the control plane, others wait for it and join by the token. A second run changes nothing.
set -eu
cd "$(dirname "$0")/../.."
host=$1
export DEBIAN_FRONTEND=noninteractive

MINOR=v1.36
POD_CIDRS=10.244.0.0/16,fd00:10:244::/56
SERVICE_CIDRS=10.96.0.0/16,fd00:10:96::/112
SERVER=192.168.50.11

test ! -e /etc/kubernetes/kubelet.conf || exit 0

# Kubernetes since 1.36 wants containerd 2, which Debian 12 has not.
apt-get install -y -qq --no-install-recommends ca-certificates curl gpg > /dev/null
install -d -m 755 /etc/apt/keyrings
curl -fsSL "https://pkgs.k8s.io/core:/stable:/$MINOR/deb/Release.key" \
    | gpg --batch --yes --dearmor -o /etc/apt/keyrings/kubernetes-apt-keyring.gpg
echo "deb [signed-by=/etc/apt/keyrings/kubernetes-apt-keyring.gpg] https://pkgs.k8s.io/core:/stable:/$MINOR/deb/ /" \
    > /etc/apt/sources.list.d/kubernetes.list
curl -fsSL https://download.docker.com/linux/debian/gpg -o /etc/apt/keyrings/docker.asc
echo "deb [signed-by=/etc/apt/keyrings/docker.asc] https://download.docker.com/linux/debian bookworm stable" \
    > /etc/apt/sources.list.d/docker.list
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confnew \
    containerd.io kubelet kubeadm kubectl podman crun
apt-mark hold kubelet kubeadm kubectl > /dev/null

# kubelet counts control groups by systemd; Debian's own configuration of containerd is for version 1.
containerd config default | sed 's/SystemdCgroup = false/SystemdCgroup = true/' > /etc/containerd/config.toml
systemctl --quiet enable containerd kubelet
systemctl restart containerd

# What kubeadm checks before it begins.
swapoff -a
sed -i '/[[:space:]]swap[[:space:]]/d' /etc/fstab
echo net.ipv4.ip_forward=1 > /etc/sysctl.d/50-kubernetes.conf
sysctl --quiet --load /etc/sysctl.d/50-kubernetes.conf

# Not the management interface, which has the same address on every machine of some providers.
addresses=$(/opt/podwire/bin/python -c 'if True:
    import sys
    from lab.guest import vagrant_plan
    print(",".join(vagrant_plan(int(sys.argv[2])).host(sys.argv[1]).addresses))' "$host" "$2")

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
podman build --quiet --network host --tag "localhost/podwire:$version" --file deploy/image/Containerfile .
podman save --quiet --output /var/tmp/podwire.tar "localhost/podwire:$version"
ctr --namespace k8s.io images import /var/tmp/podwire.tar > /dev/null
rm /var/tmp/podwire.tar

umask 077
if [ "$host" != node1 ]; then
    cat > /root/kubeadm.yaml << END
apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
discovery:
  bootstrapToken:
    apiServerEndpoint: $SERVER:6443
    token: $TOKEN
    # By the lab's own cables; the CA is made while workers wait.
    unsafeSkipCAVerification: true
nodeRegistration:
  name: $host
  kubeletExtraArgs:
    - name: node-ip
      value: $addresses
END
    tries=180
    until curl -fsk "https://$SERVER:6443/livez" > /dev/null; do
        tries=$((tries - 1))
        if [ $tries = 0 ]; then
            echo "kubernetes.sh: the control plane at $SERVER:6443 did not answer within half an hour" >&2
            exit 1
        fi
        sleep 10
    done
    exec kubeadm join --config /root/kubeadm.yaml
fi

cat > /root/kubeadm.yaml << END
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
bootstrapTokens:
  - token: $TOKEN
    ttl: 0s
localAPIEndpoint:
  advertiseAddress: $SERVER
  bindPort: 6443
nodeRegistration:
  name: $host
  kubeletExtraArgs:
    - name: node-ip
      value: $addresses
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
controlPlaneEndpoint: $SERVER:6443
networking:
  podSubnet: $POD_CIDRS
  serviceSubnet: $SERVICE_CIDRS
END
kubeadm init --config /root/kubeadm.yaml --skip-phases addon/kube-proxy

export KUBECONFIG=/etc/kubernetes/admin.conf
mkdir -p /root/.kube
cp "$KUBECONFIG" /root/.kube/config
sed -i "s,^  apiOverride: .*,  apiOverride: https://$SERVER:6443," deploy/kubernetes/overlays/kubeadm/config.yaml
podwire config check deploy/kubernetes/overlays/kubeadm/config.yaml
kubectl apply -k deploy/kubernetes/overlays/kubeadm
kubectl -n kube-system rollout status ds/podwire --timeout 10m
