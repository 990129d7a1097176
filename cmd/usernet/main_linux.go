package main

import (
	"fmt"
	"os"

	"github.com/usernet/usernet/standalone"
)

var commands = []command{
	{"serve", "", "run the daemon that Docker's networks live in", (*program).serve},
	{"plugin", "", "run the daemon as a managed Docker plugin", (*program).plugin},
	{"run", "[--] COMMAND [ARGUMENTS]", "run a command on a network of its own, without engine or root", (*program).run},
	{"ps", "", "list networks, endpoints and published ports", (*program).ps},
	{"port", "add|rm ENDPOINT PORT...", "publish or release ports of a running container", (*program).port},
	{"network", "rm NETWORK...", "remove networks that the engine has forgotten", (*program).network},
	{"gateway", "[ports]", "be the network of virtual machines, on their host", (*program).gateway},
	{"agent", "", "get a virtual machine's network from the gateway, inside it", (*program).agent},
	{"doctor", "", "tell what this machine can do, and what to type where it cannot", (*program).doctor},
	{"oci-hook", "", "give a container its network, as a hook of its OCI runtime", (*program).ociHook},
	{"version", "", "print the version", (*program).version},
}

// callers are asked in turn, before the first argument is taken for a command.
var callers = []caller{
	as(netnsName, (*program).netns),
	as(gvproxyName, (*program).gvproxy),
	as(gvforwarderName, (*program).gvforwarder),
	(*program).cni,
	(*program).netavark,
}

// helper is the program as it starts itself, for run in another user namespace. It returns false if it was called otherwise.
func helper(args []string) bool {
	run := standalone.Helper(args)
	if run == nil {
		return false
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "usernet run:", err)
		os.Exit(1)
	}
	return true
}
