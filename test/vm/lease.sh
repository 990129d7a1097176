#!/bin/sh
# What busybox's udhcpc runs when it has a lease: the machine takes the address, the route and the resolver.
if [ "$1" != bound ] && [ "$1" != renew ]; then exit; fi
ip addr replace "$ip/$mask" dev "$interface"
ip link set "$interface" mtu "${mtu:-1500}"
ip route replace default via "$router" dev "$interface"
echo "nameserver $dns" >/etc/resolv.conf
