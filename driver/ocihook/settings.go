package ocihook

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

// annotationPrefix makes an annotation of a container a setting.
const annotationPrefix = "usernet."

// The values of the setting resolv_conf.
const (
	resolvAuto = "auto" // where the bundle mounts nothing there itself
	resolvOn   = "on"
	resolvOff  = "off"
)

// Setting is one thing that can be said about a container, as an annotation or as a flag of the hook.
type Setting struct {
	Name  string // usernet.NAME is the annotation
	About string
}

// Settings are all settings but the options of a network, config.Names.
var Settings = []Setting{
	{"network", "the `name` of the network; containers that give the same one are on the same one (default " + defaultNetwork + ")"},
	{"internal", "make a network without a way out or in (`true`)"},
	{"ipv6", "make a network with IPv6 (`true`)"},
	{"publish", "publish `ports` of the container: [IP:][HOST[-END]:]PORT[/tcp|udp], separated by commas"},
	{"ip", "the container's IPv4 `address`"},
	{"ip6", "the container's IPv6 `address`"},
	{"mac", "the MAC `address` of its interface"},
	{"interface", "the `name` of its interface (default " + defaultPrefix + "0)"},
	{"name", "what the network's other containers call it (default its hostname, if the bundle gives one)"},
	{"alias", "further `names` of it, separated by commas"},
	{"dns", "the `addresses` of DNS servers that the container asks instead of its network's, separated by commas"},
	{"resolv_conf", "`when` the container gets an /etc/resolv.conf: auto, where the bundle mounts none itself; on; off"},
	{"default_route", "whether its default route leads to the network (`true`)"},
}

const (
	defaultNetwork = "oci"
	defaultPrefix  = "eth"
)

// known tells whether there is a setting of that name, or an option of networks.
func known(name string) bool {
	return slices.ContainsFunc(Settings, func(s Setting) bool { return s.Name == name }) || slices.Contains(config.Names(), name)
}

// settings are the settings of a container by their names.
type settings map[string]string

// settingsOf puts a container's annotations over the settings that every container of the hook has.
func settingsOf(base, annotations map[string]string) (settings, error) {
	s := settings(maps.Clone(base))
	if s == nil {
		s = settings{}
	}
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		name, ours := strings.CutPrefix(key, annotationPrefix)
		if !ours {
			continue
		}
		if !known(name) {
			names := config.Names()
			for _, k := range Settings {
				names = append(names, k.Name)
			}
			slices.Sort(names)
			return nil, invalid("annotation %.64q: unknown; known are %s%s", key, annotationPrefix, strings.Join(names, ", "+annotationPrefix))
		}
		s[name] = strings.TrimSpace(annotations[key])
	}
	return s, nil
}

// fields are the parts of a setting that is a list.
func (s settings) fields(name string) []string {
	return strings.FieldsFunc(s[name], func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' })
}

func (s settings) boolean(name string, unset bool) (bool, error) {
	if s[name] == "" {
		return unset, nil
	}
	b, err := strconv.ParseBool(s[name])
	if err != nil {
		return false, invalid("setting %s=%.64s: want true or false", name, s[name])
	}
	return b, nil
}

func (s settings) or(name, unset string) string {
	if v := s[name]; v != "" {
		return v
	}
	return unset
}

// wish is what the settings ask for.
type wish struct {
	control.AttachRequest
	resolv  string       // auto, on or off
	servers []netip.Addr // DNS servers for the container alone
	named   bool         // the container itself says which network it wants
}

var validName = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_.-]{0,62}$`)

// wish checks the settings of a container.
func (s settings) wish(st state, b bundle) (wish, error) {
	w := wish{resolv: s.or("resolv_conf", resolvAuto)}
	_, w.named = st.Annotations[annotationPrefix+"network"]
	switch w.resolv {
	case resolvAuto, resolvOn, resolvOff:
	default:
		return w, invalid("setting resolv_conf=%.64s: want auto, on or off", w.resolv)
	}
	w.Interface = s.or("interface", s.or("iface_prefix", defaultPrefix)+"0")
	if err := config.LinkName(w.Interface); err != nil {
		return w, err
	}
	if s["mac"] != "" {
		mac, err := net.ParseMAC(s["mac"])
		if err != nil {
			return w, invalid("setting mac=%.64s: want a MAC address", s["mac"])
		}
		w.MAC = mac.String()
	}
	w.Prepare, w.Names = true, true
	w.ID = endpointID(st, w.Interface)
	w.Container = driver.Container{ID: st.ID, Name: s.or("name", b.Hostname), Aliases: s.fields("alias")}
	if w.Container.Name == "" {
		w.Container.Name = st.ID
	}
	route, err := s.boolean("default_route", true)
	if err != nil {
		return w, err
	}
	w.NoDefault = !route
	if err := s.addresses(&w.AttachRequest); err != nil {
		return w, err
	}
	for _, spec := range s.fields("publish") {
		ports, err := config.Ports(spec)
		if err != nil {
			return w, err
		}
		for _, p := range ports {
			w.Ports = append(w.Ports, control.PortOf(p))
		}
	}
	if w.servers, err = s.servers(); err != nil {
		return w, err
	}
	w.Network, err = s.network()
	return w, err
}

func (s settings) addresses(req *control.AttachRequest) error {
	for _, name := range []string{"ip", "ip6"} {
		if s[name] == "" {
			continue
		}
		a, err := netip.ParseAddr(s[name])
		if err != nil || a.Is6() != (name == "ip6") || a.Zone() != "" {
			return invalid("setting %s=%.64s: want an address", name, s[name])
		}
		req.Addresses = append(req.Addresses, a)
	}
	return nil
}

// servers are the DNS servers that the container is to ask; none: those of its network.
func (s settings) servers() ([]netip.Addr, error) {
	var servers []netip.Addr
	for _, field := range s.fields("dns") {
		a, err := netip.ParseAddr(field)
		if err != nil || a.Zone() != "" {
			return nil, invalid("setting dns: %.64q: want an address", field)
		}
		servers = append(servers, a.Unmap())
	}
	return servers, nil
}

// network is the network that the settings describe.
func (s settings) network() (control.NetworkSpec, error) {
	n := control.NetworkSpec{Name: s.or("network", defaultNetwork), Options: map[string]string{}}
	if !validName.MatchString(n.Name) {
		return n, invalid("setting network=%.64s: want a name of letters and digits", n.Name)
	}
	n.ID = networkID(n.Name)
	for _, name := range config.Names() {
		if v, given := s[name]; given {
			n.Options[name] = v
		}
	}
	var err error
	if n.Internal, err = s.boolean("internal", false); err != nil {
		return n, err
	}
	if n.IPv6, err = s.boolean("ipv6", false); err != nil {
		return n, err
	}
	// A subnet of IPv6 says it as well. What is wrong with the options is told by whom they are for.
	for p := range strings.SplitSeq(s["subnet"], ",") {
		if p, err := netip.ParsePrefix(strings.TrimSpace(p)); err == nil && p.Addr().Is6() {
			n.IPv6 = true
		}
	}
	return n, nil
}

// networkID belongs to a name: runtimes have containers and no networks.
func networkID(name string) string {
	sum := sha256.Sum256([]byte("oci network " + name))
	return hex.EncodeToString(sum[:])
}

// endpointID begins with what differs between the interfaces of a container, because names of links are made from it, and ends
// with what they have in common.
func endpointID(st state, ifName string) string {
	key := containerKey(st)
	sum := sha256.Sum256([]byte(key + " " + ifName))
	return hex.EncodeToString(sum[:12]) + key
}

// containerKey belongs to a container. An ID is unique for one runtime only, and a bundle's directory for one container at a time.
func containerKey(st state) string {
	sum := sha256.Sum256([]byte(st.ID + "\x00" + st.Bundle))
	return hex.EncodeToString(sum[:20])
}

// isOf tells whether an endpoint is the container's.
func isOf(st state, e control.Endpoint) bool { return strings.HasSuffix(e.ID, containerKey(st)) }

// isOurs tells whether a network is one that this door has made.
func isOurs(n control.Network) bool { return n.ID == networkID(n.Name) }
