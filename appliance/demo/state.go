package demo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// State is D/demo.json: what scripts need to know of a running demo. It is
// replaced atomically whenever a pid changes.
type State struct {
	Domain  string  `json:"domain"`
	Net     string  `json:"net"`
	CAFile  string  `json:"ca_file"` // PEM that clients trust
	Nodes   []Node  `json:"nodes"`   // in the order of --offices
	Users   []User  `json:"users"`
	Alias   string  `json:"alias"`
	Group   string  `json:"group"`
	Admin   Admin   `json:"admin"`
	Outside Outside `json:"outside"`
}

// Node is one office. Pid is 0 when it does not run.
type Node struct {
	Name    string `json:"name"`
	Pid     int    `json:"pid"`
	Address string `json:"address"`
	Ports   Ports  `json:"ports"`
	Data    string `json:"data"`
	Log     string `json:"log"`
	Socket  string `json:"control_socket"`
	Config  string `json:"config"`
}

// Ports are the same in every office.
type Ports struct {
	SMTP        int `json:"smtp"`
	Submission  int `json:"submission"`
	Submissions int `json:"submissions"`
	IMAP        int `json:"imap"`
	IMAPS       int `json:"imaps"`
	HTTPS       int `json:"https"`
	Mesh        int `json:"mesh"`
}

var demoPorts = Ports{SMTP: 2525, Submission: 2587, Submissions: 2465, IMAP: 2143, IMAPS: 2993, HTTPS: 2443, Mesh: 44337}

// User is a person of the demo.
type User struct {
	Address  string `json:"address"`
	Password string `json:"password"`
	Home     string `json:"home"`
}

// Admin may change the mesh.
type Admin struct {
	Name     string `json:"name"`
	Password string `json:"password"`
}

// Outside is the small outside world.
type Outside struct {
	Name   string `json:"name"`
	Pid    int    `json:"pid"`
	SMTP   string `json:"smtp"`
	DNS    string `json:"dns"`
	Domain string `json:"domain"`
	Folder string `json:"folder"`
	Config string `json:"config"`
	Log    string `json:"log"`
}

func stateFile(dir string) string { return filepath.Join(dir, "demo.json") }

// Load reads a demo's state.
func Load(dir string) (*State, error) {
	b, err := os.ReadFile(stateFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s holds no demo; start one with: posthouse demo up --dir %s", dir, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("read demo: %w", err)
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read demo %s: %w", stateFile(dir), err)
	}
	return &s, nil
}

// save replaces the state file atomically.
func (s *State) save(dir string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write demo state: %w", err)
	}
	tmp := stateFile(dir) + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write demo state: %w", err)
	}
	return os.Rename(tmp, stateFile(dir))
}

// node finds an office by name.
func (s *State) node(name string) (*Node, error) {
	var names []string
	for i := range s.Nodes {
		if s.Nodes[i].Name == name {
			return &s.Nodes[i], nil
		}
		names = append(names, s.Nodes[i].Name)
	}
	return nil, fmt.Errorf("there is no office %q; there are %v", name, names)
}

// lock keeps two commands from changing one demo at once.
func lock(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "demo.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock demo: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock demo: %w", err)
	}
	return func() { f.Close() }, nil
}
