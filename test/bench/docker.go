package main

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/usernet/usernet/test/engine"
)

func (s *subject) network() string { return fmt.Sprintf("net%d", s.index) }

func (s *subject) container(name string) string { return name + s.network() }

// startContainers makes a network with a container a, whose agent port is published, and a container b.
func (b *rig) startContainers(s *subject) error {
	_, err := b.Docker(b.ctx, append(append([]string{"network", "create"}, s.create...), s.network())...)
	if err != nil {
		return err
	}
	for _, c := range []string{"a", "b"} {
		control := s.controlName()
		if c == "b" {
			control += c
		}
		// Docker's system call filter would slow down the load, which elsewhere has none.
		args := []string{"run", "-d", "--name", s.container(c), "--network", s.network(), "--security-opt", "seccomp=unconfined",
			"-v", b.exe() + ":/bench:ro", "-v", b.control("") + ":/control"}
		if c == "a" {
			args = append(args, "-p", fmt.Sprintf("%d:%d", s.publicPort(), agentPort))
		}
		args = append(args, engine.Image, "/bench", "agent", "/control/"+control, fmt.Sprintf("0.0.0.0:%d", agentPort))
		if _, err := b.Docker(b.ctx, args...); err != nil {
			return err
		}
	}
	s.site.publishes(s.publicPort())
	if s.isUsernet() {
		s.site.restart = b.restartUsernet
	}
	if s.isUsernet() && s.name != "usernet bridge" {
		s.site.forwarder = func() []process { return named(processes(os.Getpid()), "usernet") }
	}
	return nil
}

// restartUsernet gives usernet's subjects a daemon that has carried nothing yet.
func (b *rig) restartUsernet() error {
	if err := b.StopUsernet(); err != nil {
		return err
	}
	if err := b.StartUsernet(b.ctx, usernetFlags...); err != nil {
		return err
	}
	for _, s := range b.subjects {
		if s.isUsernet() && s.site != nil {
			if err := b.published(s); err != nil {
				return fmt.Errorf("after a restart: %s: %w", s, err)
			}
		}
	}
	return nil
}

// took runs docker commands and returns the milliseconds they took together.
func (b *rig) took(commands ...[]string) (float64, error) {
	start := time.Now()
	for _, args := range commands {
		if _, err := b.Docker(b.ctx, args...); err != nil {
			return 0, err
		}
	}
	return milliseconds(time.Since(start)), nil
}

func (b *rig) lifecycle(s *subject) ([]float64, error) {
	whole, err := b.took(
		append(append([]string{"network", "create"}, s.create...), "life"),
		[]string{"run", "--name", "lives", "--network", "life", engine.Image, "true"},
		[]string{"rm", "lives"},
		[]string{"network", "rm", "life"},
	)
	if err != nil {
		return nil, err
	}
	published, err := b.took([]string{
		"run", "--rm", "--network", s.network(), "-p", "6000:80", "-p", "6001:81", engine.Image, "true",
	})
	return []float64{whole, published}, err
}

// neighbour is the way from container a to container b.
func (b *rig) neighbour(s *subject) (path, error) {
	r, err := b.remote(s.controlName() + "b")
	if err != nil {
		return path{}, err
	}
	ip, err := b.Docker(b.ctx, "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", s.container("b"))
	if err != nil {
		return path{}, err
	}
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return path{}, err
	}
	return path{s.site.inside, r, netip.AddrPortFrom(addr, agentPort)}, nil
}
