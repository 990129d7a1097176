package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Usernet runs the usernet command in the pretend host, as whoever its networks are for.
func (h *Host) Usernet(ctx context.Context, args ...string) (string, error) {
	return h.userCommand(ctx, "", filepath.Join(h.Dir, "bin/usernet"), args...)
}

// Run runs a command of the pretend host's root in the pretend host.
func (h *Host) Run(ctx context.Context, name string, args ...string) (string, error) {
	return h.command(ctx, "", name, args...)
}

// Feed runs a command of the pretend host's root with text on its standard input.
func (h *Host) Feed(ctx context.Context, text, name string, args ...string) error {
	_, err := h.command(ctx, text, name, args...)
	return err
}

// RunOutside runs a command of the machine's own root in the outside's network namespace.
func (h *Host) RunOutside(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out []byte
	err := h.outside.ns.Do(func() (err error) {
		out, err = cmd.Output()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", strings.Join(cmd.Args, " "), ErrCommand, err)
	}
	return string(out), nil
}

// ErrCommand is in the chain of the error of a command that ran and failed.
var ErrCommand = errors.New("command failed")

func (h *Host) command(ctx context.Context, stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return h.finish(ctx, h.Command(ctx, name, args...), stdin)
}

// userCommand is command as the user, if the pretend host has one.
func (h *Host) userCommand(ctx context.Context, stdin, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return h.finish(ctx, h.user.become(h.Command(ctx, name, args...)), stdin)
}

// finish runs a command that was made with ctx, and returns what it printed.
func (h *Host) finish(ctx context.Context, cmd *exec.Cmd, stdin string) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	line := filepath.Base(cmd.Args[0]) + " " + strings.Join(cmd.Args[1:], " ")
	if err := h.Start(cmd); err != nil {
		return "", fmt.Errorf("%s: %w", line, err)
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return out.String(), fmt.Errorf("%s: %w: %w: %s", line, ErrCommand, err, strings.TrimSpace(errs.String()))
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}
