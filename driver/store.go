package driver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/usernet/usernet"
)

// store keeps what must survive the process. Networks outlive a reboot (Docker never repeats CreateNetwork), so they
// are in the state directory and every change is flushed to disk. Endpoints do not, nor do networks that are described
// anew with every endpoint: they are in the run directory, belong to one boot of the machine, and are written without a
// flush, which a killed process does not need.
type store struct {
	networks  *bolt.DB
	endpoints *bolt.DB // and transient networks
}

// The saved forms. A record is written before the kernel is touched, with Creating set, and again without it when
// all is done: what still has it after a crash was never answered for and is taken away.
type (
	savedNetwork struct {
		Creating    bool           `json:"creating,omitempty"`
		ID          string         `json:"id"`
		Name        string         `json:"name,omitempty"`
		Internal    bool           `json:"internal,omitempty"`
		Unaddressed bool           `json:"unaddressed,omitempty"`
		IPv6        bool           `json:"ipv6,omitempty"`
		Subnets     []savedSubnet  `json:"subnets,omitempty"`
		Options     savedOptions   `json:"options"`
		Added       []netip.Prefix `json:"added,omitempty"`
		Names       *naming        `json:"names,omitempty"`

		transient bool // told by the file that the record is in
	}
	savedSubnet struct {
		Prefix   netip.Prefix `json:"prefix"`
		Gateway  netip.Addr   `json:"gateway,omitzero"`
		Reserved []netip.Addr `json:"reserved,omitempty"`
		First    netip.Addr   `json:"first,omitzero"`
		Last     netip.Addr   `json:"last,omitzero"`
	}
	savedOptions struct {
		Mode          usernet.Mode `json:"mode"`
		MTU           int          `json:"mtu,omitempty"`
		ICC           bool         `json:"icc"`
		Masquerade    bool         `json:"masquerade"`
		FastPath      bool         `json:"fastpath"`
		BridgeName    string       `json:"bridge,omitempty"`
		HostBinding   netip.Addr   `json:"host_binding,omitzero"`
		Source4       netip.Addr   `json:"source_ipv4,omitzero"`
		Source6       netip.Addr   `json:"source_ipv6,omitzero"`
		IfacePrefix   string       `json:"iface_prefix,omitempty"`
		InhibitHostIP bool         `json:"inhibit_ipv4,omitempty"`
	}
	savedEndpoint struct {
		Creating   bool           `json:"creating,omitempty"`
		ID         string         `json:"id"`
		NetworkID  string         `json:"network"`
		Addr4      netip.Prefix   `json:"addr4,omitzero"`
		Addr6      netip.Prefix   `json:"addr6,omitzero"`
		More       []netip.Prefix `json:"more,omitempty"`
		Routes     []Route        `json:"routes,omitempty"`
		MAC        string         `json:"mac"`
		IfName     string         `json:"ifname,omitempty"`
		Container  *Container     `json:"container,omitempty"`
		Joined     bool           `json:"joined,omitempty"`
		Moved      bool           `json:"moved,omitempty"`
		SandboxKey string         `json:"sandbox,omitempty"`
		Gateway    bool           `json:"gateway,omitempty"`
		Ports      []savedPort    `json:"ports,omitempty"`
	}
	savedPort struct {
		Proto         usernet.Proto `json:"proto"`
		HostIP        netip.Addr    `json:"host_ip,omitzero"`
		HostPort      uint16        `json:"host_port"`
		ContainerPort uint16        `json:"container_port"`
		Manual        bool          `json:"manual,omitempty"`
		Held          bool          `json:"held,omitempty"`
	}
)

var (
	networksBucket  = []byte("networks")
	endpointsBucket = []byte("endpoints")
	metaBucket      = []byte("meta")
	bootKey         = []byte("boot")
)

func openStore(stateDir, runDir string) (_ *store, err error) {
	s := &store{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.networks, err = openDB(filepath.Join(stateDir, "networks.db"), false); err != nil {
		return nil, err
	}
	path := filepath.Join(runDir, "endpoints.db")
	s.endpoints, err = openDB(path, true)
	if errors.Is(err, errDamaged) {
		// Written without a flush: a power cut may have torn it, and then the machine was rebooted anyway.
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		s.endpoints, err = openDB(path, true)
	}
	if err != nil {
		return nil, err
	}
	return s, s.forgetOtherBoots()
}

var errDamaged = errors.New("damaged")

func openDB(path string, noSync bool) (*bolt.DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, NoSync: noSync, NoFreelistSync: true})
	switch {
	case err == nil:
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("open store %s: another usernet is using it", path)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("open store %s: %w: %w", path, errDamaged, err)
	default:
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{networksBucket, endpointsBucket, metaBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	return db, nil
}

// forgetOtherBoots drops the endpoints when the machine was booted since they were written: the run directory need not
// be a tmpfs.
func (s *store) forgetOtherBoots() error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read boot id: %w", err)
	}
	boot = bytes.TrimSpace(boot)
	return s.endpoints.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket(metaBucket)
		if bytes.Equal(meta.Get(bootKey), boot) {
			return nil
		}
		for _, name := range [][]byte{networksBucket, endpointsBucket} {
			if err := tx.DeleteBucket(name); err != nil {
				return err
			}
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return meta.Put(bootKey, boot)
	})
}

func (s *store) close() error {
	var errs []error
	for _, db := range []*bolt.DB{s.networks, s.endpoints} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

func (s *store) putNetwork(n savedNetwork) error {
	db := s.networks
	if n.transient {
		db = s.endpoints
	}
	return put(db, networksBucket, n.ID, n)
}

func (s *store) deleteNetwork(n *network) error {
	db := s.networks
	if n.transient {
		db = s.endpoints
	}
	return del(db, networksBucket, n.ID)
}

func (s *store) putEndpoint(e savedEndpoint) error {
	return put(s.endpoints, endpointsBucket, e.NetworkID+"/"+e.ID, e)
}

func (s *store) deleteEndpoint(networkID, id string) error {
	return del(s.endpoints, endpointsBucket, networkID+"/"+id)
}

func (s *store) loadNetworks() ([]savedNetwork, error) {
	lasting, err := load[savedNetwork](s.networks, networksBucket, "")
	if err != nil {
		return nil, err
	}
	transient, err := load[savedNetwork](s.endpoints, networksBucket, "")
	for i := range transient {
		transient[i].transient = true
	}
	return append(lasting, transient...), err
}

func (s *store) loadEndpoints(networkID string) ([]savedEndpoint, error) {
	return load[savedEndpoint](s.endpoints, endpointsBucket, networkID+"/")
}

func put(db *bolt.DB, bucket []byte, key string, record any) error {
	text, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("save %s: %w", key, err)
	}
	if err := db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), text) }); err != nil {
		return fmt.Errorf("save %s: %w", key, err)
	}
	return nil
}

func del(db *bolt.DB, bucket []byte, key string) error {
	if err := db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucket).Delete([]byte(key)) }); err != nil {
		return fmt.Errorf("forget %s: %w", key, err)
	}
	return nil
}

// load reads the records whose key starts with prefix. A record that cannot be read is an error: dropping it
// would lose a user's network.
func load[T any](db *bolt.DB, bucket []byte, prefix string) ([]T, error) {
	var records []T
	err := db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
			if !strings.HasPrefix(string(k), prefix) {
				return nil
			}
			var r T
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("read record %s: %w", k, err)
			}
			records = append(records, r)
			return nil
		})
	})
	return records, err
}

func (n *network) saved() savedNetwork {
	s := savedNetwork{ID: n.ID, Name: n.name, Internal: n.Internal, Unaddressed: n.Unaddressed, IPv6: n.IPv6, Added: n.added, Names: n.naming, transient: n.transient}
	for _, sub := range n.Subnets {
		s.Subnets = append(s.Subnets, savedSubnet(sub))
	}
	o := n.Options
	s.Options = savedOptions{o.Mode, o.MTU, o.ICC, o.Masquerade, o.FastPath, o.BridgeName, o.HostBinding, o.Source4, o.Source6, o.IfacePrefix, o.InhibitHostIP}
	return s
}

func (s savedNetwork) network() usernet.Network {
	n := usernet.Network{ID: s.ID, Internal: s.Internal, Unaddressed: s.Unaddressed, IPv6: s.IPv6}
	for _, sub := range s.Subnets {
		n.Subnets = append(n.Subnets, usernet.Subnet(sub))
	}
	o := s.Options
	n.Options = usernet.Options{Mode: o.Mode, MTU: o.MTU, ICC: o.ICC, Masquerade: o.Masquerade, FastPath: o.FastPath, BridgeName: o.BridgeName,
		HostBinding: o.HostBinding, Source4: o.Source4, Source6: o.Source6, IfacePrefix: o.IfacePrefix, InhibitHostIP: o.InhibitHostIP}
	return n
}

func saveEndpoint(c *container) savedEndpoint {
	s := savedEndpoint{ID: c.ID, NetworkID: c.NetworkID, Addr4: c.Addr4, Addr6: c.Addr6, More: c.more, Routes: c.routes, MAC: c.MAC.String(), IfName: c.IfName,
		Joined: c.joined, Moved: c.moved, SandboxKey: c.sandboxKey, Gateway: c.gateway}
	for _, p := range c.ports {
		s.Ports = append(s.Ports, savedPort{p.Proto, p.HostIP, p.HostPort, p.ContainerPort, p.manual, p.Held})
	}
	if c.owner.ID != "" {
		s.Container = &c.owner
	}
	return s
}

func (s savedEndpoint) container() (*container, error) {
	mac, err := net.ParseMAC(s.MAC)
	if err != nil {
		return nil, fmt.Errorf("read record %s: %w", s.ID, err)
	}
	c := &container{
		Endpoint:   usernet.Endpoint{ID: s.ID, NetworkID: s.NetworkID, Addr4: s.Addr4, Addr6: s.Addr6, MAC: mac, IfName: s.IfName},
		joined:     s.Joined,
		moved:      s.Moved,
		sandboxKey: s.SandboxKey,
		gateway:    s.Gateway,
		more:       s.More,
		routes:     s.Routes,
		since:      time.Now(),
	}
	if s.Container != nil {
		c.owner = *s.Container
	}
	for _, p := range s.Ports {
		c.ports = append(c.ports, &published{
			Port:   usernet.Port{Proto: p.Proto, HostIP: p.HostIP, HostPort: p.HostPort, HostPortEnd: p.HostPort, ContainerPort: p.ContainerPort, Held: p.Held},
			manual: p.Manual,
		})
	}
	return c, nil
}
