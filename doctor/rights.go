package doctor

import (
	"context"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// userNamespaces tries to make one. It matters to ordinary users, who are root only there; for root it only tells what
// others will find.
func (m *machine) userNamespaces(ctx context.Context) (finding, bool) {
	t := m.asUser(ctx)
	errno, refused := t.refused()
	if m.uid == 0 {
		return m.othersNamespaces(t, errno, refused)
	}
	if !refused {
		if t.err != nil {
			return finding{status: Missing, detail: fmt.Sprintf("could not be tried: %v.", t.err), essential: true}, true
		}
		return say(OK, "you may make them: usernet run and rootless networks need no root.")
	}
	reason, command := m.whyRefused(errno)
	return finding{
		status: Missing, detail: fmt.Sprintf("you may not make or use them: %s. Without root, usernet needs them.", reason),
		fix: command, essential: true,
	}, true
}

func (m *machine) othersNamespaces(t trialResult, errno syscall.Errno, refused bool) (finding, bool) {
	reason, command := m.forbidden()
	switch {
	case refused && reason == "":
		reason, command = m.whyRefused(errno)
		fallthrough
	case reason != "":
		return fix(command, Warning, "ordinary users may not make them: %s. Only root can use usernet then.", reason)
	case t.err != nil:
		return say(Warning, "could not be tried: %v.", t.err)
	}
	return say(OK, "ordinary users may make them: usernet run and rootless networks need no root.")
}

// forbidden looks for the settings by which administrators and distributions keep ordinary users from namespaces.
func (m *machine) forbidden() (reason, command string) {
	for _, s := range []struct{ path, name, bad, good string }{
		{"kernel/unprivileged_userns_clone", "kernel.unprivileged_userns_clone", "0", "1"},
		{"user/max_user_namespaces", "user.max_user_namespaces", "0", "16384"},
		{"user/max_net_namespaces", "user.max_net_namespaces", "0", "16384"},
		{"user/max_mnt_namespaces", "user.max_mnt_namespaces", "0", "16384"},
		{"kernel/apparmor_restrict_unprivileged_userns", "kernel.apparmor_restrict_unprivileged_userns", "1", "0"},
	} {
		if m.sysctl(s.path) == s.bad {
			return s.name + " is " + s.bad, m.sudo("sysctl -w " + s.name + "=" + s.good)
		}
	}
	return "", ""
}

// whyRefused finds the reason for an error of clone(2), or of the first thing that root does in the namespace.
func (m *machine) whyRefused(errno syscall.Errno) (reason, command string) {
	if reason, command := m.forbidden(); reason != "" {
		return reason, command
	}
	switch errno {
	case unix.ENOSPC, unix.EUSERS:
		return "there are as many as user.max_user_namespaces allows, or too many inside each other",
			m.sudo("sysctl -w user.max_user_namespaces=65536")
	case unix.EINVAL, unix.ENOSYS:
		return "this kernel was built without them", ""
	case unix.EPERM, unix.EACCES:
		return "something forbids it; a container's seccomp profile, a chroot and SELinux can", ""
	}
	return errno.Error(), ""
}

// ping opens what usernet needs to carry a container's ping: a ping socket, or root's raw one.
func (m *machine) ping(context.Context) (finding, bool) {
	err := tryICMP(unix.SOCK_DGRAM)
	if err != nil && tryICMP(unix.SOCK_RAW) == nil {
		return say(OK, "works from containers, by root's raw sockets.")
	}
	if err != nil {
		return fix(m.sudo(`sysctl -w net.ipv4.ping_group_range="0 2147483647"`), Warning,
			"containers cannot ping the world: group %d may not (net.ipv4.ping_group_range).", m.gid)
	}
	return say(OK, "works from containers.")
}

func tryICMP(kind int) error {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func (m *machine) lowPorts(context.Context) (finding, bool) {
	first, ok := m.number("net/ipv4/ip_unprivileged_port_start")
	switch {
	case m.uid == 0:
		return say(OK, "root may publish any port.")
	case ok && first == 0:
		return say(OK, "you may publish any port.")
	case !ok:
		first = 1024
	}
	return fix(m.sudo("sysctl -w net.ipv4.ip_unprivileged_port_start=80"), Info,
		"you may publish ports from %d. Lower ones, as 80, are for root unless you allow them.", first)
}

// fewFiles is a number of open files that a busy host reaches: a connection has two, and pipes while data is waiting.
const fewFiles = 16384

func (m *machine) openFiles(context.Context) (finding, bool) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return say(Warning, "the limit is not known: %v.", err)
	}
	return m.filesUpTo(l.Max)
}

func (m *machine) filesUpTo(limit uint64) (finding, bool) {
	if limit < fewFiles {
		return fix(m.sudo("prlimit --pid $$ --nofile=1048576"), Warning,
			"the limit of %d is low for what this shell starts: about %d connections at a time.", limit, limit/4)
	}
	return say(OK, "up to %d: about %d connections at a time.", limit, limit/4)
}

const (
	pageBudget = 16384 // the kernel's default for fs.pipe-user-pages-soft
	largePipe  = 256   // pages of the pipe through which the kernel moves a transfer's data
)

func (m *machine) pipes(context.Context) (finding, bool) {
	n, ok := m.number("fs/pipe-user-pages-soft")
	switch {
	case !ok:
		return silence()
	case m.uid == 0 || n == 0:
		return say(OK, "no limit for you: every transfer gets a large buffer.")
	case n < pageBudget:
		return fix(m.sudo(fmt.Sprintf("sysctl -w fs.pipe-user-pages-soft=%d", pageBudget)), Warning,
			"%d pages are few: with more than %d transfers at a time, new ones are slow.", n, n/largePipe)
	}
	return say(OK, "%d pages: %d transfers at a time get large buffers, more get small ones.", n, n/largePipe)
}

// shortQueue is less than what bursts of connections need; kernels before 5.4 had 128.
const shortQueue = 1024

func (m *machine) listenQueue(context.Context) (finding, bool) {
	n, ok := m.number("net/core/somaxconn")
	switch {
	case !ok:
		return silence()
	case n < shortQueue:
		return fix(m.sudo("sysctl -w net.core.somaxconn=4096"), Warning,
			"net.core.somaxconn is %d: bursts of clients of a published port may have to try again.", n)
	}
	return say(OK, "up to %d clients may wait for a published port.", n)
}

func (m *machine) selinux(context.Context) (finding, bool) {
	if text, err := m.read("/sys/fs/selinux/enforce"); err != nil || text != "1" {
		return silence()
	}
	return fix(m.sudo("restorecon -RFv /run/docker/plugins /run/usernet"), Info,
		"enforcing: Docker may call usernet's socket only if its label is that of the directory. If calls are refused, restore the labels.")
}
