// Package standalone runs a command on a usermode network of its own, without an engine and, where the kernel lets
// ordinary users have user namespaces, without root.
//
// It takes two processes. The outer one is the one that was called: it has the gateway, the published ports and the
// resolver, all with ordinary sockets of the host. The inner one is started in a user, a network and a mount namespace
// of its own; it makes the fabric there, lends it (usermode.Lend), and starts the command in another network namespace
// that hangs on the fabric as a container does. When either ends, by whatever cause, so do the other and the command,
// and the kernel takes away what they had.
package standalone

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"syscall"

	"github.com/usernet/usernet"
)

// The arguments that make the program one of the other processes.
const (
	innerCommand  = "standalone-inner"
	holderCommand = "standalone-holder"
)

// Helper returns what main has to do when the program's arguments are those of one of the other processes; nil: it was
// called by somebody else.
func Helper(args []string) func() error {
	if len(args) != 1 {
		return nil
	}
	return map[string]func() error{innerCommand: inner, holderCommand: hold}[args[0]]
}

// Config says what to run and on which network.
type Config struct {
	Command  []string
	Network  usernet.Network // of mode Usermode, complete: with subnets and their gateways
	Addr4    netip.Addr      // the command's; on a shared network zero means any that is free
	Addr6    netip.Addr      // likewise; otherwise zero means no IPv6
	Ports    []usernet.Port
	Servers  []netip.AddrPort // upstream resolvers; none: the host's
	NoEgress bool             // the command reaches nothing outside; published ports work
	Share    string           // the name of a network that several commands share; "": the command is alone
	Hostname string           // Share: what the others call the command
	Keep     bool             // the command has the caller's user ID instead of root's
	Log      *slog.Logger

	Stdin          *os.File
	Stdout, Stderr *os.File
}

// Run runs the command until it ends, and returns how it ended. Signals that the process gets go to the command.
//
// An error is one of ours: the command was not started, or what had to be cleaned up is left.
func Run(cfg Config) (status syscall.WaitStatus, err error) {
	if cfg.Share != "" {
		return runShared(cfg)
	}
	in, err := startInner(cfg, alone, nil)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	n, err := openNetwork(cfg, in)
	if err != nil {
		return 0, err
	}
	defer n.close()
	release, err := n.publish("usernet run", cfg.Ports, cfg.Addr4, cfg.Addr6)
	if err != nil {
		return 0, err
	}
	defer release()
	defer in.passSignals()()
	return in.wait()
}
