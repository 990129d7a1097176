package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/usernet/usernet/test/bench/load"
	"github.com/usernet/usernet/test/engine"
)

const agentPort = 9000

// farAgent is where the loads out of the networks go.
var farAgent = netip.AddrPortFrom(engine.FarAddr, agentPort)

// usernetFlags are what usernet is started with beyond the usual.
var usernetFlags = []string{"--log-level", "warn"}

// startTimeout bounds the start of a peer.
const startTimeout = 15 * time.Second

// rig is the pretend host with its subjects, an agent in the namespace outside and one beside the forwarders.
type rig struct {
	*engine.Engine
	config

	ctx      context.Context
	subjects []*subject
	outside  *load.Remote
	local    *load.Remote
	closers  []io.Closer
	jobs     uint64
	failures []error // of our own subjects
}

// exe is this program, where the pretend host and its containers find it too.
func (b *rig) exe() string { return filepath.Join(b.Dir, "bin/bench") }

// control is the socket of an agent. Its directory is there for every user.
func (b *rig) control(name string) string { return filepath.Join(b.Dir, "control", name) }

// prepare starts the agents and every subject. A peer that does not start is missing; one of our own is an error.
func (b *rig) prepare() error {
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.exe(), exe, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(b.control(""), 0o777); err != nil {
		return err
	}
	if err := os.Chmod(b.control(""), 0o777); err != nil { // in spite of the umask
		return err
	}
	if err := b.agents(); err != nil {
		return err
	}
	if err := b.settings(); err != nil {
		return err
	}
	for _, s := range allSubjects() {
		if s.mandatory || b.config.subjects.MatchString(s.String()) {
			b.subjects = append(b.subjects, s)
		}
	}
	for i, s := range b.subjects {
		s.index = i
		fmt.Fprintf(os.Stderr, "starting %s\n", s)
		if err := b.begin(s); err != nil {
			return err
		}
	}
	return nil
}

// begin starts a subject.
func (b *rig) begin(s *subject) error {
	s.site = &site{}
	err := s.start(b, s)
	if err == nil {
		err = b.enter(s)
	}
	if err == nil {
		err = b.tune()
	}
	if err == nil && s.site.published.IsValid() {
		err = b.published(s)
	}
	if err == nil {
		return nil
	}
	s.site.stop()
	s.site = nil
	if s.own || b.ctx.Err() != nil {
		return fmt.Errorf("%s: %w", s, err)
	}
	s.missing = err
	fmt.Fprintf(os.Stderr, "%s is missing: %v\n", s, err)
	return nil
}

// enter connects to the agent inside a subject.
func (b *rig) enter(s *subject) (err error) {
	if s.site.inside, err = b.remote(s.controlName(), s.site.daemons...); err != nil {
		return err
	}
	return b.until(func() error {
		p, err := s.site.inside.Place(b.ctx)
		if err == nil && !p.Gateway.IsValid() {
			err = errors.New("no default route")
		}
		s.site.gateway = p.Gateway
		return err
	}, s.site.daemons...)
}

// published waits until a subject's public port answers.
func (b *rig) published(s *subject) error {
	for _, w := range []way{fromOutside, fromLocalhost} {
		err := b.until(func() error {
			p, err := w(b, s)
			if err == nil {
				_, err = b.drive(p, load.Job{Kind: load.TCPEcho, Length: time.Millisecond})
			}
			return err
		}, s.site.daemons...)
		if err != nil {
			return err
		}
	}
	return nil
}

// agents starts the one outside and the one beside the forwarders. Both are processes of the pretend host and end with it.
func (b *rig) agents() error {
	ns, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", b.Outside().NS().Fd()))
	if err != nil {
		return err
	}
	defer ns.Close()
	far := b.Command(b.ctx, "nsenter", "--net=/proc/self/fd/3", b.exe(), "agent", b.control("outside"), farAgent.String())
	far.ExtraFiles = []*os.File{ns}
	if _, err := b.daemon("outside", far); err != nil {
		return err
	}
	if b.outside, err = b.remote("outside"); err != nil {
		return err
	}
	near := b.Command(b.ctx, b.exe(), "agent", b.control("local"), "127.0.0.1:9999")
	if _, err := b.daemon("local", near); err != nil {
		return err
	}
	b.local, err = b.remote("local")
	return err
}

// settings makes the pretend host one where every peer may do what it can. Its root is an overlay: what is written there
// does not last.
func (b *rig) settings() error {
	// The machine's own node may be for root only.
	_, err := b.Run(b.ctx, "sh", "-c", `mknod -m 666 /run/tun c 10 200 && mount --bind /run/tun /dev/net/tun &&
		echo bench:x:1000:1000::/tmp:/bin/sh >>/etc/passwd && echo bench:100000:65536 >>/etc/subuid &&
		echo bench:100000:65536 >>/etc/subgid && mkdir -m 700 /run/bench && chown 1000:1000 /run/bench`)
	return err
}

// finish ends what runs. What is in the pretend host goes with it.
func (b *rig) finish() {
	for _, s := range b.subjects {
		if s.site != nil {
			s.site.stop()
		}
	}
	for _, c := range b.closers {
		c.Close()
	}
}

// remote waits for an agent. It gives up when one of the daemons ends.
func (b *rig) remote(name string, daemons ...*daemon) (r *load.Remote, err error) {
	err = b.until(func() error {
		r, err = load.Dial(b.ctx, b.control(name))
		return err
	}, daemons...)
	if err != nil {
		return nil, fmt.Errorf("agent %s: %w", name, err)
	}
	b.closers = append(b.closers, r)
	return r, nil
}

// until waits for probe to succeed.
func (b *rig) until(probe func() error, daemons ...*daemon) error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := probe()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || b.ctx.Err() != nil {
			return fmt.Errorf("not ready in time: %w%s", err, logs(daemons))
		}
		for _, d := range daemons {
			if d.ended() {
				return fmt.Errorf("%s ended%s", d.name, logs(daemons))
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}
