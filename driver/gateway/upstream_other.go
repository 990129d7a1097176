//go:build !windows

package gateway

import (
	"log/slog"

	"github.com/usernet/usernet/dns/resolvconf"
)

// upstream are the host's resolvers. On macOS, resolv.conf(5) has those of the primary network; what a VPN has for some domains only
// is not in it.
type upstream struct{ *resolvconf.Follower }

func newUpstream(log *slog.Logger) upstream {
	return upstream{resolvconf.NewFollower(resolvconf.Path, log)}
}

// Search are the domains in which the host looks for names.
func (u upstream) Search() []string { return u.Config().Search }
