#!/bin/sh
# What makes a machine of the QEMU lab boot quickly on an emulated processor: image only, run in its chroot.
#
# Each process that a boot starts costs such a processor about 0.1 s. What is switched off has no use in a machine with
# one disk that is never repaired, no screen, and a life of minutes.
set -eu

mask() {
    for unit in "$@"; do ln -sf /dev/null "/etc/systemd/system/$unit"; done
}

systemctl --quiet set-default multi-user.target
systemctl --quiet enable systemd-networkd.service ssh.service
# No screens, logins on them, or consoles to ask passwords on.
mask getty.target systemd-logind.service systemd-ask-password-wall.path systemd-ask-password-console.path \
    systemd-user-sessions.service
# Disks: mounted by the initrd, writable already, no others.
mask systemd-remount-fs.service systemd-fsck-root.service e2scrub_reap.service remote-fs.target systemd-repart.service \
    systemd-pstore.service proc-sys-fs-binfmt_misc.automount systemd-binfmt.service
# Mounts and modules that nothing here needs (/sys/fs/bpf and cgroups are systemd's own doing).
mask dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount sys-kernel-config.mount kmod-static-nodes.service modprobe@configfs.service \
    modprobe@dm_mod.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service \
    modprobe@loop.service systemd-modules-load.service systemd-tmpfiles-setup-dev.service
# Done once and for all in the image, or of no use to it.
mask systemd-random-seed.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-journal-flush.service systemd-journal-catalog-update.service systemd-journald-audit.socket \
    systemd-boot-system-token.service systemd-hwdb-update.service \
    systemd-machine-id-commit.service systemd-firstboot.service systemd-sysusers.service ldconfig.service \
    systemd-initctl.socket systemd-network-generator.service systemd-networkd-wait-online.service \
    first-boot-complete.target timers.target
mask systemd-udev-settle.service cryptsetup.target integritysetup.target veritysetup.target

# Programs that look for units to make, at each boot and reload; nothing of theirs is here.
mkdir -p /etc/systemd/system-generators
for generator in bless-boot cryptsetup debug fstab getty gpt-auto hibernate-resume integritysetup rc-local run \
    system-update sysv veritysetup; do
    ln -sf /dev/null "/etc/systemd/system-generators/systemd-$generator-generator"
done

# Rules for devices that these machines do not have, which udev reads at its start and looks through for each event.
mkdir -p /etc/udev/rules.d
for rules in 55-dm 60-autosuspend 60-cdrom_id 60-drm 60-evdev 60-fido-id 60-infiniband 60-input-id 60-persistent-alsa \
    60-persistent-input 60-persistent-storage-dm 60-persistent-storage-tape 60-persistent-storage 60-persistent-v4l \
    60-sensor 60-serial 64-btrfs 70-camera 70-joystick 70-memory 70-mouse 70-power-switch 70-touchpad 70-uaccess \
    71-seat 73-seat-late 75-probe_mtd 78-sound-card 85-hwclock 90-nm-thunderbolt 95-dm-notify 96-e2scrub; do
    ln -sf /dev/null "/etc/udev/rules.d/$rules.rules"
done
mkdir -p /etc/tmpfiles.d
for files in home journal-nocow legacy provision static-nodes-permissions systemd-nologin systemd-pstore systemd-tmp \
    tmp x11; do
    ln -sf /dev/null "/etc/tmpfiles.d/$files.conf"
done

# udev tells of network interfaces only; other devices are the initrd's doing, or announce themselves when they come.
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d
printf '[Service]\nExecStart=\nExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=net\n' \
    > /etc/systemd/system/systemd-udev-trigger.service.d/lab.conf

# The same in every machine of the lab until its own files say otherwise.
systemd-machine-id-setup > /dev/null 2>&1
: > /etc/fstab
